"""Tolerances: relative norms, used by every comparison of tensors in the tests."""

import torch
from torch import Tensor

SAME_MATHS = 1e-10
"""The same mathematics in another order, in float64: disagreement is a bug, not noise."""


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """Return ||actual - reference|| / ||reference|| in float64; the plain norm if reference is 0.

    Returns NaN or infinity if the two are not both finite. Raises AssertionError if shapes differ.
    """
    assert actual.shape == reference.shape, f"{tuple(actual.shape)} != {tuple(reference.shape)}"
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, r = (x.detach().to("cpu", wide) for x in (actual, reference))
    error = torch.linalg.vector_norm(a - r).item()
    norm = torch.linalg.vector_norm(r).item()
    return error / norm if norm > 0 else error


def assert_matches(actual: Tensor, reference: Tensor, tolerance: float | None = None) -> None:
    """Fail unless `relative_error(actual, reference) <= tolerance`; NaN never passes.

    tolerance: None means `SAME_MATHS`, and requires float64 for both.
    """
    if tolerance is None:
        assert actual.dtype == reference.dtype == torch.float64, "give a tolerance below float64"
        tolerance = SAME_MATHS
    error = relative_error(actual, reference)
    # Written so that NaN fails.
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"


def assert_as_good_as_eager(
    actual: Tensor, eager: Tensor, reference: Tensor, noise: float = 1e-7
) -> None:
    """Fail if a kernel's error is more than twice that of eager torch, plus `noise`.

    This is flash-attention's rule, for outputs and gradients.

    Args:
        actual: the kernel's result.
        eager: eager PyTorch's result in the same dtype.
        reference: the result in float32 or wider.
    """
    error, allowed = relative_error(actual, reference), relative_error(eager, reference)
    assert error <= 2 * allowed + noise, (
        f"relative error {error:.3g}, eager has {allowed:.3g}: more than twice, plus {noise:.3g}"
    )

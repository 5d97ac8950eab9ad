"""Checks for a GPU that all kernels share: repeatable bits, and offsets beyond 32 bits."""

from collections.abc import Callable

import torch
from torch import Tensor

Compute = Callable[[list[Tensor], Tensor], list[Tensor]]


def assert_same_bits(compute: Callable[[], list[Tensor]]) -> None:
    """Assert that five calls of `compute` return equal bits."""
    first, *others = (compute() for _ in range(5))
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def large_tensor() -> Tensor:
    """Return bf16 `[3, 2048, 1408, 256]`, 0 but for its last row, behind 2^31 elements."""
    home = torch.zeros(3, 2048, 1408, 256, dtype=torch.bfloat16, device="cuda")
    assert home[:-1].numel() < 2**31 < home.numel()
    home[-1].normal_()
    return home


def assert_right_behind_2_to_the_31(compute: Compute) -> None:
    """Assert that the last row of a large batch gives the bits that it gives alone.

    compute: ([q, k, v], dout) -> results and gradients, for q of 1408 heads, k and v of 2. k and v
    are views of q's tensor, so their rows lie behind 2^31 elements as well.
    """
    home = large_tensor()
    dout = torch.zeros_like(home)
    dout[-1].normal_()
    qkv = [x.detach().requires_grad_() for x in (home, home[:, :, :2], home[:, :, 2:4])]
    actual = compute(qkv, dout)
    expected = compute([x.detach()[-1:].requires_grad_() for x in qkv], dout[-1:])
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a[-1:], b) and torch.all(a[:-1] == 0)

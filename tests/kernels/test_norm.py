"""Norm of the residual stream by torch and by kernels: values, and gradients that meet at once."""

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lcdist_kernels.norm import add_norm, add_norm_reference, kernel, scale_rows
from tests.kernels.helpers import HERE
from tests.kernels.test_swiglu import IMPLS, TOLERANCE, scattered, strided
from tests.kernels.tiers import covering, one
from tests.saved import saved_bytes
from tests.tolerance import assert_matches

EPS = 1e-3


def leaves_of(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return x, delta and a weight that ask for gradients."""
    x, delta = (torch.randn(*shape, device=HERE) for _ in range(2))
    weight = 1 + torch.randn(shape[-1], device=HERE) / 2
    return [y.to(dtype).requires_grad_() for y in (x, delta, weight)]


def gradients(outs: Sequence[Tensor], leaves: list[Tensor], douts: list[Tensor]) -> list[Tensor]:
    """Return the gradients of the leaves that ask for one."""
    return [*torch.autograd.grad(outs, [x for x in leaves if x.requires_grad], douts)]


def assert_right(
    impl: str,
    leaves: list[Tensor],
    layout: Callable[[Tensor], Tensor] = torch.clone,
    stream: bool = True,
    normed: bool = True,
) -> None:
    """Assert that sums, norms and gradients are the reference's, with random upstream gradients.

    leaves: x, delta, if there is one, and the weight. stream, normed: which outputs are used.
    """
    tolerance = TOLERANCE[leaves[0].dtype]
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
    outs = []
    for form, of, given in (
        (layout, lambda *more: add_norm(*more, impl), leaves),
        (torch.clone, add_norm_reference, wide),
    ):
        *stream_parts, weight = given
        x, *delta = map(form, stream_parts)
        outs.append(of(x, delta[0] if delta else None, weight, EPS)[:2])
    for actual, truth in zip(*outs, strict=True):
        assert actual.dtype == leaves[0].dtype
        assert_matches(actual, truth, tolerance)
    used = [n for n, is_used in enumerate((stream, normed)) if is_used]
    douts = [torch.randn_like(outs[0][n]) for n in used]
    got = gradients([outs[0][n] for n in used], leaves, [*map(layout, douts)])
    truths = gradients([outs[1][n] for n in used], wide, [x.double() for x in douts])
    for actual, truth in zip(got, truths, strict=True):
        assert_matches(actual, truth, tolerance)


@pytest.mark.parametrize(
    ("impl", "dtype", "shape", "layout", "adds"),
    covering(
        IMPLS,
        one([(7, 3, 70), (5, 64), (1, 1, 1), (3, 2, 2050)]),
        one([strided, torch.clone, scattered]),
        one([True, False]),
    ),
)
def test_equals_the_reference(
    impl: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: Callable[[Tensor], Tensor],
    adds: bool,
) -> None:
    x, delta, weight = leaves_of(shape, dtype)
    assert_right(impl, [x, delta, weight] if adds else [x, weight], layout)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_gradients_that_are_not_asked_for(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Four rows for each part of the weight's gradient, three for the last.
    monkeypatch.setattr(kernel, "MOST_PARTS", 5)
    x, delta, weight = leaves_of((19, 10), torch.float32)
    assert_right(impl, [x, delta, weight], normed=True, stream=False)
    assert_right(impl, [x, delta.detach(), weight])
    assert_right(impl, [x.detach(), delta, weight])
    assert_right(impl, [x, delta, weight.detach()])
    assert_right(impl, [x.detach(), weight], stream=False)
    assert_right(impl, [x, weight.detach()], stream=False)
    assert_right(impl, [x, delta, weight.detach()], normed=False)


def test_gradcheck_and_one_backward() -> None:
    x, delta, weight = leaves_of((3, 4), torch.float64)
    for leaves in ((x, delta, weight), (x, None, weight)):
        assert torch.autograd.gradcheck(lambda *y: add_norm(*y, EPS)[:2], leaves)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_stream_is_not_copied_and_the_norm_is_made_again(impl: str) -> None:
    x, delta, weight = leaves_of((9, 2, 70), torch.float32)
    for other in (delta, None):
        with saved_bytes() as saved:
            total, normed, rstd = add_norm(x, other, weight, EPS, impl)
        assert (total.data_ptr() == x.data_ptr()) == (other is None)
        assert set(saved) == {y.data_ptr() for y in (total, rstd, weight)}
        assert rstd.shape == (9, 2, 1) and not rstd.requires_grad
        again = scale_rows(strided(total.detach()), rstd, weight, EPS, impl)
        assert torch.equal(again, normed) and again.shape == x.shape


def test_a_graph_without_a_backward_is_freed_under_hooks() -> None:
    x, delta, weight = leaves_of((3, 4), torch.float32)
    with saved_bytes():
        total, *_ = add_norm(x, delta, weight, EPS)
    alive = weakref.ref(total.grad_fn)
    gc.disable()
    del total, _
    freed = alive() is None
    gc.enable()
    assert freed


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(3, 4)
    for delta, weight in ((x[:2], x[0]), (x.double(), x[0]), (x, x[0, :3]), (x, x[0].bfloat16())):
        with pytest.raises(ValueError, match="expected x and delta of one shape"):
            add_norm(x, delta, weight, EPS)


def test_no_rows_are_nothing() -> None:
    for impl in ("torch", "triton"):
        x, delta, weight = leaves_of((0, 6), torch.float32)
        outs = add_norm(x, delta, weight, EPS, impl)[:2]
        *_, dweight = gradients(outs, [x, delta, weight], [*outs])
        assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_add_norm_takes_the_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    x, delta, weight = leaves_of((4099, 2, 3072), dtype)
    for impl in ("auto", "triton"):
        assert_right(impl, [x, delta, weight])
    assert all(map(torch.equal, *(add_norm(x, delta, weight, EPS, i) for i in ("auto", "triton"))))

"""SwiGLU by torch and by kernels: values, gradients in gate_up's own memory, and one backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lcdist_kernels.swiglu import swiglu, swiglu_gradient_, swiglu_reference
from tests.kernels.helpers import HERE
from tests.kernels.tiers import covering, one
from tests.tolerance import assert_matches

# Below fp32, two roundings: kernels round once, torch after every operation.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def gradient(z: Tensor, source: Tensor, dz: Tensor) -> Tensor:
    """Return the gradient of what gate_up was copied from."""
    return torch.autograd.grad(z, source, dz)[0]


def strided(x: Tensor) -> Tensor:
    """Return x as a view whose rows are apart in a buffer of NaN."""
    home = torch.full((*x.shape[:-1], x.shape[-1] + 6), torch.nan).to(x)
    return home[..., : x.shape[-1]].copy_(x)


def scattered(x: Tensor) -> Tensor:
    """Return x as a view whose features are apart."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


IMPLS = [
    *(("torch", dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    *(("triton", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]


@pytest.mark.parametrize(
    ("impl", "dtype", "shape", "layout"),
    covering(
        IMPLS,
        one([(3, 2, 14), (5, 4098), (1, 1, 2), (7, 3, 64)]),
        one([strided, torch.clone, scattered]),
    ),
)
def test_equals_the_reference(
    impl: str, dtype: torch.dtype, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]
) -> None:
    source = (3 * torch.randn(*shape, device=HERE)).to(dtype).requires_grad_()
    dz = torch.randn(*shape[:-1], shape[-1] // 2, device=HERE).to(dtype)
    wide = source.detach().double().requires_grad_()
    truth = swiglu_reference(wide)
    z = swiglu(layout(source), impl)
    assert z.is_contiguous() and z.dtype == dtype
    assert_matches(z, truth, TOLERANCE[dtype])
    got = gradient(z, source, layout(dz))
    assert_matches(got, gradient(truth, wide, dz.double()), TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_gradient_is_written_over_gate_and_up(impl: str) -> None:
    source = torch.randn(5, 3, 14, device=HERE, requires_grad=True)
    gate_up = strided(source)
    seen: list[Tensor] = []
    gate_up.register_hook(seen.append)
    z = swiglu(gate_up, impl)
    kept = z.detach().clone()
    z.sum().backward(retain_graph=True)
    assert seen[0].data_ptr() == gate_up.data_ptr() and torch.equal(seen[0], gate_up)
    assert torch.equal(z, kept)
    assert gate_up._base is not None and gate_up._base[..., 14:].isnan().all()
    with pytest.raises(RuntimeError, match="has already run and overwritten"):
        z.sum().backward()


@pytest.mark.parametrize(("impl", "dtype"), IMPLS)
@pytest.mark.parametrize("width", [7, 2049])
def test_z_is_made_again_beside_the_gradient(impl: str, dtype: torch.dtype, width: int) -> None:
    source = (3 * torch.randn(3, 5, 2 * width, device=HERE)).to(dtype).requires_grad_()
    dz = torch.randn(3, 5, width, device=HERE).to(dtype)
    z = swiglu(source, impl)
    truth = gradient(z, source, dz)
    for again in (True, False):
        got, made = swiglu_gradient_(source.detach().clone(), dz.clone(), again, impl)
        assert torch.equal(got, truth)
        assert (made is not None) == again and (made is None or torch.equal(made, z))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_memory_that_others_read_is_not_lost_in_silence(impl: str) -> None:
    leaf = torch.randn(5, 14, device=HERE, requires_grad=True)
    before = leaf.detach().clone()
    for gate_up in (leaf, leaf[1:].view(2, 2, 14)):
        swiglu(gate_up, impl).sum().backward()
        assert torch.equal(leaf, before) and leaf.grad is not None
    # The backward of sigmoid reads its output.
    z = swiglu(leaf.sigmoid(), impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected gate and up \[.., 2 n\]"):
        swiglu(torch.ones(3, 5))
    with pytest.raises(ValueError, match="impl = 'fused' is unknown"):
        swiglu(torch.ones(3, 4), "fused")
    with pytest.raises(ValueError, match="the tensors are torch.float64"):
        swiglu(torch.ones(3, 4, dtype=torch.float64, device=HERE), "triton")


def test_no_rows_are_nothing() -> None:
    for impl in ("torch", "triton"):
        source = torch.ones(0, 3, 6, device=HERE, requires_grad=True)
        z = swiglu(source * 1, impl)
        assert z.shape == (0, 3, 3) and gradient(z, source, z).shape == source.shape


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_swiglu_takes_the_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    source = torch.randn(1000, 2, 2 * 8192, device="cuda").to(dtype).requires_grad_()
    dz = torch.randn(1000, 2, 8192, device="cuda").to(dtype)
    found = []
    for impl in ("auto", "triton"):
        z = swiglu(source * 1, impl)
        found.append((z, gradient(z, source, dz)))
    assert all(map(torch.equal, *found))
    wide = source.detach().double().requires_grad_()
    truth = swiglu_reference(wide)
    assert_matches(found[0][0], truth, TOLERANCE[dtype])
    assert_matches(found[0][1], gradient(truth, wide, dz.double()), TOLERANCE[dtype])

"""The split of the fused projection: torch and kernel against the plain reference, both ways."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary
from lcdist_kernels.qkv import QkvShape, split_qkv, split_qkv_reference
from tests.kernels.helpers import HERE
from tests.kernels.test_rotary import frequencies
from tests.tolerance import assert_matches, relative_error

# Key heads, queries of each, head_dim.
SHAPES = [QkvShape(1, 1, 16), QkvShape(2, 3, 20), QkvShape(3, 2, 64)]
BATCH, SEQLEN = 2, 37


def in_nan(shape: QkvShape, dtype: torch.dtype) -> Tensor:
    """Return a product `[s, b, width]` as a view into a larger buffer of NaN."""
    width = shape.nheads_kv * (shape.group + 2) * shape.head_dim
    home = torch.full((SEQLEN + 5, BATCH + 1, 2 * width), torch.nan, device=HERE, dtype=dtype)
    return home[:SEQLEN, :BATCH, :width].copy_(torch.randn(SEQLEN, BATCH, width))


def with_gradient(
    split: Any, mixed: Tensor, douts: list[Tensor], *more: Any, **words: Any
) -> list[Tensor]:
    """Return q, k, v and the gradient of `mixed`."""
    leaf = mixed.detach().requires_grad_()
    outs = split(leaf, *more, **words)
    assert all(x.is_contiguous() for x in outs) or split is split_qkv_reference
    return [*outs, *torch.autograd.grad(outs, leaf, [x.to(leaf.dtype) for x in douts])]


def douts_of(shape: QkvShape) -> list[Tensor]:
    heads = (shape.nheads_kv * shape.group, shape.nheads_kv, shape.nheads_kv)
    # Gradients of attention's views have their heads before their tokens.
    return [
        torch.randn(BATCH, n, SEQLEN, shape.head_dim, device=HERE).transpose(1, 2) for n in heads
    ]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(shape: QkvShape, by_row: bool, impl: str) -> None:
    mixed, douts = in_nan(shape, torch.float32), douts_of(shape)
    rotary = Rotary(frequencies(shape.head_dim), 1.1)
    positions = torch.randint(0, 1000, (BATCH, SEQLEN) if by_row else (SEQLEN,))
    for turn in ((None, None), (rotary, positions)):
        got = with_gradient(split_qkv, mixed, douts, shape, *turn, impl=impl)
        truth = with_gradient(split_qkv_reference, mixed.cpu().double(), douts, shape, *turn)
        for actual, expected in zip(got, truth, strict=True):
            # fp32 angles of torch are off by up to 1e-4 at these positions.
            assert_matches(actual.cpu(), expected, 1e-6 if impl == "triton" else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    shape = SHAPES[1]
    mixed, douts = in_nan(shape, dtype), douts_of(shape)
    turn = Rotary(frequencies(20)), torch.arange(SEQLEN)
    impl = "torch" if dtype == torch.float64 else "triton"
    got = with_gradient(split_qkv, mixed, douts, shape, *turn, impl=impl)
    truth = with_gradient(split_qkv_reference, mixed.cpu().double(), douts, shape, *turn)
    for actual, expected in zip(got, truth, strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual.cpu(), expected) <= torch.finfo(dtype).eps


def test_backward_needs_neither_the_product_nor_its_parts() -> None:
    saved: list[Tensor] = []
    leaf = in_nan(SHAPES[1], torch.float32).detach().requires_grad_()
    turn = Rotary(frequencies(20)), torch.arange(SEQLEN)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        outs = split_qkv(leaf, SHAPES[1], *turn)
    kept = {x.untyped_storage()._cdata for x in outs}
    assert leaf.untyped_storage()._cdata not in kept and len(kept) == 3 and not saved


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 2, 99\): expected \[s, b, 200\]"):
        split_qkv(torch.zeros(3, 2, 99), SHAPES[1])

"""Inputs on the kernels' device, and comparisons, that the kernels' tests share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary
from lcdist_kernels.triton_common import Launch
from tests.attention.body import Problem, make, on_virtual_ranks, whole
from tests.kernels.test_full import borders, inputs, with_grads
from tests.kernels.test_rotary import frequencies
from tests.tolerance import assert_matches

FP32 = 1e-4
# The device that runs the kernels: a GPU, or the CPU with Triton's interpreter.
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sequence, heads, head_dim.
SHAPES = [(n, (4, 2), 16) for n in (1, 63, 100, 257, 128)]
SHAPES += [(100, heads, 16) for heads in ((8, 8), (8, 4), (8, 1))]
SHAPES += [(70, (2, 1), head_dim) for head_dim in (18, 48, 80, 128, 256)]
SMALL = [Launch(16, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)]


def on_its_device(problem: Problem) -> Problem:
    """Keep the first row of the problem's batch, on the device of the kernels."""
    problem.qkv, problem.dout = [x[:1].to(HERE) for x in problem.qkv], problem.dout[:1].to(HERE)
    return problem


def on_device(seqlen: int, *more: Any, **words: Any) -> list[Tensor]:
    """Return `inputs` as leaves on the device of the kernels."""
    made = inputs(seqlen, *more, **words)
    return [x.detach().to(HERE).requires_grad_() for x in made]


def first_row(*shape: Any) -> list[Tensor]:
    """Return the first row of fp32 inputs of a shape, as leaves on the device of the kernels."""
    return [x[:1].detach().requires_grad_() for x in on_device(*shape, torch.float32)]


def wide(qkv: list[Tensor]) -> list[Tensor]:
    """Return tensors as float64 leaves on the CPU."""
    return [x.detach().cpu().double().requires_grad_() for x in qkv]


def truth_by(reference: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """Return the function of (leaves, dout, **words) -> a reference's out and gradients, wide."""

    def truth_of(leaves: list[Tensor], dout: Tensor, **words: Any) -> list[Tensor]:
        doubles = wide(leaves)
        return with_grads(reference(*doubles, **words), doubles, dout.cpu().double())

    return truth_of


def rotated_and_packed(seqlen: int, head_dim: int, packed: bool) -> dict[str, Any]:
    """Return the keywords of an operator that rotates, and that packs documents if `packed`."""
    cu_seqlens = borders(seqlen) if packed else None
    return {"rotary": Rotary(frequencies(head_dim), 1.1), "cu_seqlens": cu_seqlens}


def in_nan(x: Tensor) -> Tensor:
    """Return x as a view into a larger buffer of NaN, its tokens far apart."""
    batch, seqlen, nheads, head_dim = x.shape
    home = torch.full((seqlen + 70, batch, nheads + 1, head_dim + 6), torch.nan).to(x)
    view = home[:seqlen, :, :nheads, :head_dim].transpose(0, 1)
    return view.copy_(x)


def assert_close(got: list[Tensor], truth: list[Tensor], tolerance: float = FP32) -> None:
    """Assert that each tensor matches its truth."""
    for actual, reference in zip(got, truth, strict=True):
        assert_matches(actual, reference, tolerance)


def assert_kernels_are_right(
    attend: Callable[..., Tensor],
    truth_of: Callable[..., list[Tensor]],
    leaves: list[Tensor],
    **more: Any,
) -> None:
    """Assert that a method's kernels give its truth in fp32, out and gradients."""
    dout = torch.randn_like(leaves[0])
    got = with_grads(attend(*leaves, **more, impl="triton"), leaves, dout)
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, truth_of(leaves, dout, **more))


def assert_ranks_of_kernels_are_right(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that ranks with kernels give the truth, and send the bytes that torch sends."""
    on_its_device(problem)
    sent_by_torch = on_virtual_ranks(problem, "torch")[1]
    # Tiled torch cannot stand in unseen.
    monkeypatch.setattr("lcdist_kernels.full.tiled.tiles_of_band", None)
    got, sent = on_virtual_ranks(problem, "triton")
    assert_close(got, whole(problem))
    assert sent == sent_by_torch


def assert_close_partial(out: Tensor, lse: Tensor, dense: tuple[Tensor, Tensor]) -> None:
    """Assert that a partial is the dense one, and that rows without keys are 0 and -inf."""
    empty = dense[1] == -torch.inf
    assert torch.equal(lse.cpu() == -torch.inf, empty)
    assert torch.all(out.cpu().transpose(1, 2)[empty] == 0)
    assert_close([out], [dense[0]])
    assert_close([lse.cpu().masked_fill(empty, 0)], [dense[1].masked_fill(empty, 0)])


# What kernels refuse: head_dim, dtype, message.
REFUSED = [
    (16, torch.float64, "bf16, fp16 and fp32, the tensors are torch.float64"),
    (14, torch.float32, "even head_dim from 16 to 256, not 14"),
]


def assert_refused(
    method: str, attend: Callable[..., Tensor], head_dim: int, dtype: torch.dtype, message: str
) -> None:
    """Assert that a method's kernels refuse a head_dim or dtype, and its ring float64."""
    with pytest.raises(ValueError, match=message):
        attend(*on_device(4, (2, 1), head_dim, dtype))
    problem = make(method, "contiguous", 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="the tensors are torch.float64"):
        on_virtual_ranks(on_its_device(problem), "triton")

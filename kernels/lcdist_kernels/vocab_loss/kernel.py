"""Cross-entropy over a shard of the vocabulary in two kernels; the formulas are in `reference.py`.

    logits `[t, columns]`, bf16, fp16 or fp32    program: one row, loop over tiles of BLOCK columns

The first reads a row once, with a running maximum and sum in fp32. The second reads and overwrites
it. Nothing else of the logits' size is read or written: for bf16, 2 + 4 bytes an element.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.triton_common import LOWEST, launch_context

# Two loads of 16 bytes a thread with 8 warps and two bytes an element.
BLOCK = 4096
WARPS = 8


@triton.jit
def _stats_kernel(
    logits, targets, lse, picked, first, real, columns, stride_t, BLOCK: tl.constexpr
):
    """Write a row's log-sum-exp and its target's logit."""
    i_t = tl.program_id(0).to(tl.int64)
    p_row = logits + i_t * stride_t
    largest = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, real, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        # The mask is by columns, a multiple of 16 in practice: by `real` no load would be a vector.
        b_x = tl.load(p_row + o_v, mask=o_v < columns, other=0.0).to(tl.float32)
        b_x = tl.where(o_v < real, b_x, float("-inf"))
        grown = tl.maximum(largest, tl.max(b_x, 0))
        total = total * tl.exp(largest - grown) + tl.sum(tl.exp(b_x - grown), 0)
        largest = grown
    # A shard of padding alone has -inf. Comparing with 0 keeps NaN.
    is_empty = total == 0.0
    b_lse = largest + tl.log(tl.where(is_empty, 1.0, total))
    tl.store(lse + i_t, tl.where(is_empty, float("-inf"), b_lse))
    column = tl.load(targets + i_t) - first
    is_here = (column >= 0) & (column < real)
    b_picked = tl.load(p_row + column, mask=is_here, other=0.0)
    tl.store(picked + i_t, b_picked.to(tl.float32))


@triton.jit
def _grad_kernel(logits, targets, lse, dout, first, real, columns, stride_t, BLOCK: tl.constexpr):
    """Overwrite a row of logits with its gradient."""
    i_t = tl.program_id(0).to(tl.int64)
    p_row = logits + i_t * stride_t
    b_lse, b_dout = tl.load(lse + i_t), tl.load(dout + i_t)
    column = tl.load(targets + i_t) - first
    column = tl.where((column >= 0) & (column < real), column, -1).to(tl.int32)
    for start in range(0, columns, BLOCK):
        o_v = start + tl.arange(0, BLOCK)
        m_v = o_v < columns
        b_x = tl.load(p_row + o_v, mask=m_v, other=0.0).to(tl.float32)
        # Padding may hold anything: exp(-inf) is 0 without an overflow.
        b_x = tl.exp(tl.where(o_v < real, b_x - b_lse, float("-inf")))
        b_dx = (b_x - tl.where(o_v == column, 1.0, 0.0)) * b_dout
        b_dx = tl.where(o_v < real, b_dx, 0.0)
        tl.store(p_row + o_v, b_dx.to(logits.dtype.element_ty), mask=m_v)


def stats(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Return lse and picked logits, fp32 `[t]`, as `op.stats` says; targets contiguous."""
    lse, picked = (
        torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2)
    )
    _launch(_stats_kernel, logits, targets, lse, picked, first, real)
    return lse, picked


def grad_(
    logits: Tensor, targets: Tensor, lse: Tensor, dout: Tensor, first: int, real: int
) -> None:
    """Overwrite the logits with their gradient, as `op.grad_` says; lse, dout fp32 contiguous."""
    _launch(_grad_kernel, logits, targets, lse, dout, first, real)


def _launch(
    kernel: triton.JITFunction, logits: Tensor, targets: Tensor, one: Tensor, two: Tensor,
    first: int, real: int,
) -> None:  # fmt: skip
    """Launch one of the two kernels, which have the same arguments, on every row."""
    count, columns = logits.shape
    if not count:
        return
    with launch_context(logits):
        kernel[(count,)](
            logits, targets, one, two, first, real, columns, logits.stride(0),
            BLOCK=min(BLOCK, triton.next_power_of_2(max(columns, 16))), num_warps=WARPS,
        )  # fmt: skip

"""RMSNorm of a sum as kernels that read once and write once; formulas in `op.py`.

    t, n, dx `[rows, h]`    forward: a program a row; backward: a program for some rows in order,
                            which also sums its part of dw; then a program for some columns of dw

Values are fp32 inside, after the sum has been rounded to its dtype, as it is stored.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.rows import as_rows
from lcdist_kernels.triton_common import launch_context

# Parts of dw: enough programs to fill a GPU, few enough that their parts cost little. Fixed, so
# that sums do not depend on the GPU.
MOST_PARTS = 512
# Tiles of the sum over parts.
BLOCK_P, BLOCK_N = 64, 32


@triton.jit
def _norm_fwd_kernel(
    x, delta, weight, total, normed, rstd,
    width, eps, stride_x, stride_delta, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute n and r of a row; with ADD, of t = x + delta, which is written too."""
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m = o_n < width
    b_t = tl.load(x + i_row * stride_x + o_n, mask=m, other=0.0)
    if ADD:
        b_delta = tl.load(delta + i_row * stride_delta + o_n, mask=m, other=0.0)
        b_t = (b_t.to(tl.float32) + b_delta.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + i_row * width + o_n, b_t, mask=m)
    b_t = b_t.to(tl.float32)
    b_r = tl.rsqrt(tl.sum(b_t * b_t, 0) / width + eps)
    b_w = tl.load(weight + o_n, mask=m, other=0.0).to(tl.float32)
    tl.store(rstd + i_row, b_r)
    tl.store(normed + i_row * width + o_n, (b_t * b_r * b_w).to(normed.dtype.element_ty), mask=m)


@triton.jit
def _norm_scale_kernel(total, rstd, weight, normed, width, stride, BLOCK: tl.constexpr):
    """Compute n of a row of t by r, in the order of operations of the forward."""
    i_row = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m = o_n < width
    b_t = tl.load(total + i_row * stride + o_n, mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(weight + o_n, mask=m, other=0.0).to(tl.float32)
    b_n = b_t * tl.load(rstd + i_row) * b_w
    tl.store(normed + i_row * width + o_n, b_n.to(normed.dtype.element_ty), mask=m)


@triton.jit
def _norm_bwd_kernel(
    total, rstd, weight, dnormed, dtotal, dx, parts,
    rows, rows_a_part, width, stride_t, stride_dn, stride_dt,
    THROUGH: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute dx of some rows and, with WEIGHT, their part of dw.

    THROUGH: dtotal is added to dx.
    """
    i_part = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m = o_n < width
    b_w = tl.load(weight + o_n, mask=m, other=0.0).to(tl.float32)
    b_dw = tl.zeros([BLOCK], dtype=tl.float32)
    first = i_part * rows_a_part
    o_r = first
    o_t, o_dn, o_dt = first * stride_t + o_n, first * stride_dn + o_n, first * stride_dt + o_n
    o_dx = first * width + o_n
    for _ in range(0, tl.minimum(rows_a_part, rows - first)):
        b_r = tl.load(rstd + o_r)
        b_a = tl.load(total + o_t, mask=m, other=0.0).to(tl.float32) * b_r
        b_dn = tl.load(dnormed + o_dn, mask=m, other=0.0).to(tl.float32)
        b_g = b_dn * b_w
        b_dx = (b_g - b_a * (tl.sum(b_g * b_a, 0) / width)) * b_r
        if THROUGH:
            b_dx += tl.load(dtotal + o_dt, mask=m, other=0.0).to(tl.float32)
        tl.store(dx + o_dx, b_dx.to(dx.dtype.element_ty), mask=m)
        if WEIGHT:
            b_dw += b_dn * b_a
        o_r += 1
        o_t += stride_t
        o_dn += stride_dn
        o_dt += stride_dt
        o_dx += width
    if WEIGHT:
        tl.store(parts + i_part * width + o_n, b_dw, mask=m)


@triton.jit
def _norm_dweight_kernel(
    parts, dweight, count, width, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Sum some columns of `count` parts of dw, in a fixed order."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_p = tl.arange(0, BLOCK_P)
    m_n = o_n < width
    b_sum = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for start in range(0, count, BLOCK_P):
        m = (start + o_p < count)[:, None] & m_n[None, :]
        b_sum += tl.load(parts + (start + o_p)[:, None] * width + o_n[None, :], mask=m, other=0.0)
    tl.store(dweight + o_n, tl.sum(b_sum, 0).to(dweight.dtype.element_ty), mask=m_n)


def fwd(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return t, n and r of x and delta `[.., h]`; as `op.fwd`."""
    total = x if delta is None else _like(x)
    normed = _like(x)
    rstd = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        first = as_rows(x)
        second = first if delta is None else as_rows(delta)
        rows, width = first.shape
        with launch_context(x):
            _norm_fwd_kernel[(rows,)](
                first, second, weight.contiguous(), total, normed, rstd, width, eps,
                first.stride(0), second.stride(0), ADD=delta is not None, **_columns(width),
            )  # fmt: skip
    return total, normed, rstd


def scale(total: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """Return n of t `[.., h]` and r `[.., 1]`."""
    normed = _like(total)
    if total.numel():
        given = as_rows(total)
        rows, width = given.shape
        with launch_context(total):
            _norm_scale_kernel[(rows,)](
                given, rstd, weight.contiguous(), normed, width, given.stride(0), **_columns(width)
            )
    return normed


def bwd(
    total: Tensor, rstd: Tensor, weight: Tensor, dnormed: Tensor, dtotal: Tensor | None,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of t `[.., h]` and of the weight; as `op.bwd`."""
    dx = _like(total)
    if not total.numel():
        return dx, torch.zeros_like(weight) if needs_dweight else None
    given, upstream = as_rows(total), as_rows(dnormed)
    through = upstream if dtotal is None else as_rows(dtotal)
    rows, width = given.shape
    rows_a_part = triton.cdiv(rows, MOST_PARTS)
    count = triton.cdiv(rows, rows_a_part)
    parts, dweight = rstd, None
    if needs_dweight:
        dweight = torch.empty(width, dtype=weight.dtype, device=weight.device)
        parts = torch.empty(count, width, dtype=torch.float32, device=total.device)
    with launch_context(total):
        _norm_bwd_kernel[(count,)](
            given, rstd, weight.contiguous(), upstream, through, dx, parts, rows, rows_a_part,
            width, given.stride(0), upstream.stride(0), through.stride(0),
            THROUGH=dtotal is not None, WEIGHT=needs_dweight, **_columns(width),
        )  # fmt: skip
        if dweight is not None:
            _norm_dweight_kernel[(triton.cdiv(width, BLOCK_N),)](
                parts, dweight, count, width, BLOCK_P=BLOCK_P, BLOCK_N=BLOCK_N
            )
    return dx, dweight


def _like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor like x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _columns(width: int) -> dict[str, int]:
    """Return the columns of a tile and its warps: 16 elements a thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}

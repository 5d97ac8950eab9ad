"""CoCA's elementwise maps as kernels that read once and write once; formulas in `transform.py`.

    x, primal, y `[b, s, h, d or d / 2]`; cos, sin `[1 or b, s, 1, d / 2]`

               heads 0 ......... h - 1
             +-------------------------+      one program: a tile of BLOCK_S tokens of one batch
    tokens   | -----> loop over heads  |      row, grid (token tiles, b); the tile's cosines and
             +-------------------------+      sines are loaded once for all heads

Products are fp32; only the result is rounded.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.coca.transform import Angles
from lcdist_kernels.triton_common import last_dim_contiguous, launch_context, strides

BLOCK_S = 16


@triton.jit
def _load_halves(p, o, m, HALF: tl.constexpr):
    """Return the two halves of the features of one head, in fp32."""
    b_one = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    b_two = tl.load(p + o + HALF, mask=m, other=0.0).to(tl.float32)
    return b_one, b_two


@triton.jit
def _coca_kernel(
    x, primal, y, cos, sin,
    seqlen, nheads,
    stride_xb, stride_xs, stride_xh, stride_primal_b, stride_primal_s, stride_primal_h,
    stride_yb, stride_ys, stride_yh, stride_ab, stride_as,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, STRICT: tl.constexpr,
    MAP: tl.constexpr,
):  # fmt: skip
    """Compute one elementwise map; MAP says which.

    "queries", "keys": q' or k' of x. "queries_bwd": the gradient of q = `primal` from x, that of
    q'. "keys_bwd": the gradient of tau from x, that of k'.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_f = tl.arange(0, BLOCK_H)
    m = (o_s < seqlen)[:, None] & (o_f < HALF)[None, :]
    o_row = o_s.to(tl.int64)[:, None]
    o_a = i_b * stride_ab + o_row * stride_as + o_f[None, :]
    b_cos = tl.load(cos + o_a, mask=m, other=0.0)
    b_sin = tl.load(sin + o_a, mask=m, other=0.0)
    o_x = i_b * stride_xb + o_row * stride_xs + o_f[None, :]
    o_primal = i_b * stride_primal_b + o_row * stride_primal_s + o_f[None, :]
    o_y = i_b * stride_yb + o_row * stride_ys + o_f[None, :]
    for _ in range(0, nheads):
        if MAP == "queries":
            b_a, b_b = _load_halves(x, o_x, m, HALF)
            if STRICT:
                b_square = b_a * b_a + b_b * b_b
                b_one, b_two = b_square * b_cos, b_square * b_sin
            else:
                b_one = b_a * (b_a * b_cos - b_b * b_sin)
                b_two = b_b * (b_b * b_cos + b_a * b_sin)
        elif MAP == "queries_bwd":
            b_g, b_h = _load_halves(x, o_x, m, HALF)
            b_a, b_b = _load_halves(primal, o_primal, m, HALF)
            if STRICT:
                b_square = 2 * (b_g * b_cos + b_h * b_sin)
                b_one, b_two = b_a * b_square, b_b * b_square
            else:
                b_across = (b_h - b_g) * b_sin
                b_one = 2 * b_g * b_a * b_cos + b_across * b_b
                b_two = 2 * b_h * b_b * b_cos + b_across * b_a
        elif MAP == "keys":
            b_tau = tl.load(x + o_x, mask=m, other=0.0).to(tl.float32)
            if STRICT:
                b_one, b_two = b_tau * b_cos, b_tau * b_sin
            else:
                b_one, b_two = b_tau * (b_cos - b_sin), b_tau * (b_cos + b_sin)
        else:
            b_g, b_h = _load_halves(x, o_x, m, HALF)
            if STRICT:
                b_one = b_g * b_cos + b_h * b_sin
            else:
                b_one = b_g * (b_cos - b_sin) + b_h * (b_cos + b_sin)
        tl.store(y + o_y, b_one.to(y.dtype.element_ty), mask=m)
        if MAP != "keys_bwd":
            tl.store(y + o_y + HALF, b_two.to(y.dtype.element_ty), mask=m)
        o_x += stride_xh
        o_primal += stride_primal_h
        o_y += stride_yh


def queries(q: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return q' of q `[b, s, h, d]`, in q.dtype."""
    return _apply_map("queries", q, q, angles, variant, q.shape[3], q.dtype)


def queries_bwd(dqueries: Tensor, q: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return the gradient of q `[b, s, h, d]` from that of q', in q.dtype."""
    return _apply_map("queries_bwd", dqueries, q, angles, variant, q.shape[3], q.dtype)


def keys(tau: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return k' `[b, s, h, d]` of tau `[b, s, h, d / 2]`, in tau.dtype."""
    return _apply_map("keys", tau, tau, angles, variant, 2 * tau.shape[3], tau.dtype)


def keys_bwd(dkeys: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return the gradient of tau `[b, s, h, d / 2]` from that of k', in fp32."""
    return _apply_map("keys_bwd", dkeys, dkeys, angles, variant, dkeys.shape[3] // 2, torch.float32)


def _apply_map(
    name: str, x: Tensor, primal: Tensor, angles: Angles, variant: str, features: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Launch the map `name` of x; primal: q for "queries_bwd", else unused."""
    x, primal, half = last_dim_contiguous(x), last_dim_contiguous(primal), angles.cos.shape[3]
    batch, seqlen, nheads = x.shape[:3]
    y = torch.empty((batch, seqlen, nheads, features), dtype=dtype, device=x.device)
    if not y.numel():
        return y
    cos, sin = last_dim_contiguous(angles.cos), last_dim_contiguous(angles.sin)
    with launch_context(x):
        _coca_kernel[(triton.cdiv(seqlen, BLOCK_S), batch)](
            x, primal, y, cos, sin, seqlen, nheads, *strides(x, primal, y),
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), HALF=half,
            BLOCK_H=triton.next_power_of_2(half), BLOCK_S=BLOCK_S, STRICT=variant == "strict",
            MAP=name,
        )  # fmt: skip
    return y

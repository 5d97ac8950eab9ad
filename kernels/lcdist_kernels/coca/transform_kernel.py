"""CoCA's elementwise maps in kernels that read once and write once; the maths is in `transform.py`.

A program takes a tile of tokens and all heads, so that a token's cosines and sines are read once.
Products are fp32; only the result is rounded.
"""
# What a kernel's arguments are, `tl.constexpr` decides, which is no type to Python's checkers.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.coca.transform import Angles
from lcdist_kernels.triton_common import launching, rows

BLOCK_S = 16


@triton.jit
def _halves(p, o, m, HALF: tl.constexpr):
    b_one = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    b_two = tl.load(p + o + HALF, mask=m, other=0.0).to(tl.float32)
    return b_one, b_two


@triton.jit
def _coca_kernel(
    x,
    of,
    y,
    cos,
    sin,
    seqlen,
    nheads,
    stride_xb,
    stride_xs,
    stride_xh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_yb,
    stride_ys,
    stride_yh,
    stride_ab,
    stride_as,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    STRICT: tl.constexpr,
    MAP: tl.constexpr,
):
    """MAP: "queries" or "keys" of x, or the adjoint, "queries_bwd" of x at `of` or "keys_bwd"."""
    i_b = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_f = tl.arange(0, BLOCK_H)
    m = (o_s < seqlen)[:, None] & (o_f < HALF)[None, :]
    o_row = o_s.to(tl.int64)[:, None]
    o_a = i_b * stride_ab + o_row * stride_as + o_f[None, :]
    b_cos = tl.load(cos + o_a, mask=m, other=0.0)
    b_sin = tl.load(sin + o_a, mask=m, other=0.0)
    o_x = i_b * stride_xb + o_row * stride_xs + o_f[None, :]
    o_o = i_b * stride_ob + o_row * stride_os + o_f[None, :]
    o_y = i_b * stride_yb + o_row * stride_ys + o_f[None, :]
    for _ in range(0, nheads):
        if MAP == "queries":
            b_a, b_b = _halves(x, o_x, m, HALF)
            if STRICT:
                b_square = b_a * b_a + b_b * b_b
                b_one, b_two = b_square * b_cos, b_square * b_sin
            else:
                b_one = b_a * (b_a * b_cos - b_b * b_sin)
                b_two = b_b * (b_b * b_cos + b_a * b_sin)
        elif MAP == "queries_bwd":
            b_g, b_h = _halves(x, o_x, m, HALF)
            b_a, b_b = _halves(of, o_o, m, HALF)
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
            b_g, b_h = _halves(x, o_x, m, HALF)
            if STRICT:
                b_one = b_g * b_cos + b_h * b_sin
            else:
                b_one = b_g * (b_cos - b_sin) + b_h * (b_cos + b_sin)
        tl.store(y + o_y, b_one.to(y.dtype.element_ty), mask=m)
        if MAP != "keys_bwd":
            tl.store(y + o_y + HALF, b_two.to(y.dtype.element_ty), mask=m)
        o_x += stride_xh
        o_o += stride_oh
        o_y += stride_yh


def queries(q: Tensor, at: Angles, variant: str) -> Tensor:
    """q' of q `[b, s, h, d]`, in q.dtype."""
    return _mapped("queries", q, q, at, variant, q.shape[3], q.dtype)


def queries_bwd(dqueries: Tensor, q: Tensor, at: Angles, variant: str) -> Tensor:
    """The gradient of q `[b, s, h, d]` from that of q', in q.dtype."""
    return _mapped("queries_bwd", dqueries, q, at, variant, q.shape[3], q.dtype)


def keys(tau: Tensor, at: Angles, variant: str) -> Tensor:
    """k' `[b, s, h, d]` of tau `[b, s, h, d / 2]`, in tau.dtype."""
    return _mapped("keys", tau, tau, at, variant, 2 * tau.shape[3], tau.dtype)


def keys_bwd(dkeys: Tensor, at: Angles, variant: str) -> Tensor:
    """The gradient of tau `[b, s, h, d / 2]` from that of k', in fp32."""
    return _mapped("keys_bwd", dkeys, dkeys, at, variant, dkeys.shape[3] // 2, torch.float32)


def _mapped(
    name: str,
    x: Tensor,
    of: Tensor,
    at: Angles,
    variant: str,
    features: int,
    dtype: torch.dtype,
) -> Tensor:
    x, of, half = rows(x), rows(of), at.cos.shape[3]
    batch, seqlen, nheads = x.shape[:3]
    y = torch.empty((batch, seqlen, nheads, features), dtype=dtype, device=x.device)
    if not y.numel():
        return y
    cos, sin = rows(at.cos), rows(at.sin)
    with launching(x):
        _coca_kernel[(triton.cdiv(seqlen, BLOCK_S), batch)](
            x,
            of,
            y,
            cos,
            sin,
            seqlen,
            nheads,
            *x.stride()[:3],
            *of.stride()[:3],
            *y.stride()[:3],
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            HALF=half,
            BLOCK_H=triton.next_power_of_2(half),
            BLOCK_S=BLOCK_S,
            STRICT=variant == "strict",
            MAP=name,
        )
    return y

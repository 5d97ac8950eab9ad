"""One tile of softmax attention under a band: what the loops of several kernels step through.

The maths is in `full.kernel`; the tables of a band come from `bands`.
"""
# What a kernel's arguments are, `tl.constexpr` decides, which is no type to Python's checkers.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl

from lcdist_kernels.triton_common import dot, load_tile


@triton.jit
def seen(q_idx, q_lo, k_idx, HAS_LO: tl.constexpr):
    m = k_idx <= q_idx
    if HAS_LO:
        m = m & (k_idx >= q_lo)
    return m


@triton.jit
def ranges_of(ranges, i):
    p = ranges + i * 4
    return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)


@triton.jit
def nth_masked(i, first, full_lo, full_hi):
    """The i-th of the tiles that need a mask: those before the whole ones, then those after."""
    before = full_lo - first
    return tl.where(i < before, first + i, full_hi + i - before)


@triton.jit
def fwd_step(
    b_q,
    b_out,
    b_max,
    b_sum,
    p_k,
    p_v,
    i_n,
    seqlen_k,
    stride_ks,
    stride_vs,
    qk_scale,
    b_q_idx,
    b_q_lo,
    k_idx,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    MASKED: tl.constexpr,
):
    start = i_n * BLOCK_N
    b_k = load_tile(p_k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if MASKED:
        o_n = start + tl.arange(0, BLOCK_N)
        b_k_idx = tl.load(k_idx + o_n, mask=o_n < seqlen_k, other=2147483647)
        m_s = seen(b_q_idx[:, None], b_q_lo[:, None], b_k_idx[None, :], HAS_LO)
        b_s = tl.where(m_s, b_s * qk_scale, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
    else:
        # qk_scale >= 0: one multiplication a row, and one fused with the subtraction an element.
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)
        b_p = tl.exp2(b_s * qk_scale - b_new[:, None])
    b_rescale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
    b_v = load_tile(p_v, start, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
    return b_out, b_new, b_sum


@triton.jit
def dq_step(
    b_q,
    b_dout,
    b_dq,
    b_lse,
    b_delta,
    p_k,
    p_v,
    i_n,
    seqlen_k,
    stride_ks,
    stride_vs,
    qk_scale,
    b_q_idx,
    b_q_lo,
    k_idx,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    MASKED: tl.constexpr,
):
    start = i_n * BLOCK_N
    b_k = load_tile(p_k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_v = load_tile(p_v, start, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_p = tl.exp2(b_s * qk_scale - b_lse[:, None])
    if MASKED:
        o_n = start + tl.arange(0, BLOCK_N)
        b_k_idx = tl.load(k_idx + o_n, mask=o_n < seqlen_k, other=2147483647)
        m_s = seen(b_q_idx[:, None], b_q_lo[:, None], b_k_idx[None, :], HAS_LO)
        b_p = tl.where(m_s, b_p, 0.0)
    b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_ds = b_p * (b_dp - b_delta[:, None])
    return dot(b_ds.to(b_k.dtype), b_k, b_dq)

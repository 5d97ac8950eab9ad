"""Tensorized attention in Triton: a branch and the hop of a mode in one sweep over its fibres.

With the branches and hops of `tensorized.tiled`, rows of fibre (o, r) of mode j are the tokens
(o n_j + i) s_j + r: strided rows of the tensors as they are, so nothing is transposed or copied. A
program owns a tile of a fibre's queries (out, U, dq) or of its keys (dk, dU). Where hop and branch
have the same queries they share a sweep: before the diagonal one accumulator serves both, there it
forks, and beyond it only the hop goes on. A branch's partial is merged into the finer ones' in the
epilogue. Nothing is added atomically. Scores carry log2 e, exponentials are base 2.
"""
# What a kernel's arguments are, `tl.constexpr` decides, which is no type to Python's checkers.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl

from lcdist_kernels.softmax_steps import fwd_step, nth_masked, ranges_of
from lcdist_kernels.triton_common import LN2, LOG2E, LOWEST, load_tile, store_tile


@triton.jit
def place(tiles, stride, nheads):
    """(tile, head, row of offset 0 in the batch's sequence, fibre's outer number) of a program.

    Heads run fastest, then offsets: neighbours read neighbouring rows.
    """
    i = tl.program_id(0)
    i_h = i % nheads
    i = i // nheads
    i_r = i % stride
    i = i // stride
    return i % tiles, i_h.to(tl.int64), i_r.to(tl.int64), (i // tiles).to(tl.int64)


@triton.jit
def _finished(b_out, b_top, b_total):
    """(normalised out, lse); 0 and -inf of a row that saw nothing."""
    m_empty = b_total == 0
    b_total = tl.where(m_empty, 1.0, b_total)
    b_lse = tl.where(m_empty, float("-inf"), (b_top + tl.log2(b_total)) * LN2)
    return b_out / b_total[:, None], b_lse


@triton.jit
def _fwd_all(
    b_q,
    b_out,
    b_top,
    b_total,
    p_k,
    p_u,
    first,
    size_k,
    step_k,
    step_u,
    qk_scale,
    k_idx,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Key tiles from the first on, all seen by all queries."""
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    whole = tl.maximum(size_k // BLOCK_N, first)
    for i in range(0, whole - first):
        b_out, b_top, b_total = fwd_step(
            b_q, b_out, b_top, b_total, p_k, p_u, first + i, size_k, step_k, step_u, qk_scale,
            b_all, b_all, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False,
        )  # fmt: skip
    for i in range(0, tl.cdiv(size_k, BLOCK_N) - whole):
        b_out, b_top, b_total = fwd_step(
            b_q, b_out, b_top, b_total, p_k, p_u, whole + i, size_k, step_k, step_u, qk_scale,
            b_all, b_all, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, True,
        )  # fmt: skip
    return b_out, b_top, b_total


@triton.jit
def _merged(b_out, b_lse, b_so_far, b_old):
    """Two partials as one; a row that saw nothing in either stays empty."""
    b_most = tl.maximum(b_old, b_lse)
    b_most = tl.where(b_most == float("-inf"), 0.0, b_most)
    b_here = tl.exp2((b_lse - b_most) * LOG2E)
    b_there = tl.exp2((b_old - b_most) * LOG2E)
    b_sum = b_here + b_there
    m_empty = b_sum == 0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_out = b_out * (b_here / b_sum)[:, None] + b_so_far * (b_there / b_sum)[:, None]
    return b_out, tl.where(m_empty, float("-inf"), b_most + tl.log2(b_sum) * LN2)


@triton.jit
def _tensorized_fwd_kernel(
    q,
    k,
    u,
    so_far,
    so_far_lse,
    out,
    lse,
    hopped,
    lam,
    bias,
    q_idx,
    q_lo,
    k_idx,
    ranges,
    before,
    qk_scale,
    size_q,
    size_k,
    stride,
    outers,
    nheads,
    seqlen,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_ub,
    stride_us,
    stride_uh,
    stride_pb,
    stride_ps,
    stride_ph,
    stride_ob,
    stride_os,
    stride_oh,
    stride_hb,
    stride_hs,
    stride_hh,
    GROUP_K: tl.constexpr,
    GROUP_U: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    BRANCH: tl.constexpr,
    HOP: tl.constexpr,
    MERGE: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """so_far: the partial of finer branches, of p's strides; bias: of this branch, a head each.

    before (BEFORE): how many whole blocks before its own each block's branch sees.
    """
    tiles = tl.cdiv(size_q, BLOCK_M)
    i_m, i_h, i_r, i_o = place(tiles, stride, nheads)
    # Late queries have most keys of a branch: they start first.
    i_m = tiles - 1 - i_m
    i_b, i_o = i_o // outers, i_o % outers
    # Tokens of the fibre: row + i * stride.
    row_q = i_o * size_q * stride + i_r
    row_k = i_o * size_k * stride + i_r
    i_row = (i_b * nheads + i_h) * seqlen + row_q
    p_q = q + i_b * stride_qb + i_h * stride_qh + row_q * stride_qs
    p_k = k + i_b * stride_kb + (i_h // GROUP_K) * stride_kh + row_k * stride_ks
    p_u = u + i_b * stride_ub + (i_h // GROUP_U) * stride_uh + row_k * stride_us
    wide = tl.cast(stride, tl.int64)
    step_q, step_k, step_u = stride_qs * wide, stride_ks * wide, stride_us * wide

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < size_q
    o_row = i_row + o_m.to(tl.int64) * stride
    b_q = load_tile(p_q, start, size_q, step_q, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    # A hop sees every key there is, a query that is not there what it likes.
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_top = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    hop_from = 0
    if BRANCH:
        b_q_idx = tl.load(q_idx + o_m, mask=m_m, other=-2147483648)
        b_q_lo = tl.load(q_lo + o_m, mask=m_m, other=0) if HAS_LO else b_q_idx
        first, full_lo, full_hi, stop = ranges_of(ranges, i_m)
        for i in range(0, full_hi - full_lo):
            b_out, b_top, b_total = fwd_step(
                b_q, b_out, b_top, b_total, p_k, p_u, full_lo + i, size_k, step_k, step_u,
                qk_scale, b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
                False,
            )  # fmt: skip
        hop_out, hop_top, hop_total = b_out, b_top, b_total
        for i in range(0, (full_lo - first) + (stop - full_hi)):
            i_n = nth_masked(i, first, full_lo, full_hi)
            b_out, b_top, b_total = fwd_step(
                b_q, b_out, b_top, b_total, p_k, p_u, i_n, size_k, step_k, step_u,
                qk_scale, b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
                True,
            )  # fmt: skip
            if HOP:
                # The same tile and scores: the compiler computes what they share once.
                hop_out, hop_top, hop_total = fwd_step(
                    b_q, hop_out, hop_top, hop_total, p_k, p_u, i_n, size_k, step_k, step_u,
                    qk_scale, b_all, b_all, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
                    True,
                )  # fmt: skip
        hop_from = tl.maximum(stop, full_hi)
        if BEFORE:
            # The blocks just before this one, one run of rows, all of it in the past.
            rows_before = tl.load(before + i_o) * size_k
            b_out, b_top, b_total = _fwd_all(
                b_q, b_out, b_top, b_total, p_k - rows_before * step_k, p_u - rows_before * step_u,
                0, rows_before, step_k, step_u, qk_scale, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
        b_out, b_lse = _finished(b_out, b_top, b_total)
        if MERGE:
            b_lse += tl.load(bias + i_h)
            b_old = tl.load(so_far_lse + o_row, mask=m_m, other=0.0)
            p_p = so_far + i_b * stride_pb + i_h * stride_ph + row_q * stride_ps
            b_so_far = load_tile(
                p_p, start, size_q, stride_ps * wide, BLOCK_M, HEAD_DIM, BLOCK_D, False
            )
            b_out, b_lse = _merged(b_out, b_lse, b_so_far, b_old)
        p_out = out + i_b * stride_ob + i_h * stride_oh + row_q * stride_os
        store_tile(p_out, b_out, start, size_q, stride_os * wide, BLOCK_M, HEAD_DIM, BLOCK_D)
        tl.store(lse + o_row, b_lse, mask=m_m)
        b_out, b_top, b_total = hop_out, hop_top, hop_total
    if HOP:
        b_out, b_top, b_total = _fwd_all(
            b_q, b_out, b_top, b_total, p_k, p_u, hop_from, size_k, step_k, step_u, qk_scale,
            k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        b_out, b_lam = _finished(b_out, b_top, b_total)
        p_hop = hopped + i_b * stride_hb + i_h * stride_hh + row_q * stride_hs
        store_tile(p_hop, b_out, start, size_q, stride_hs * wide, BLOCK_M, HEAD_DIM, BLOCK_D)
        tl.store(lam + o_row, b_lam, mask=m_m)


@triton.jit
def _row_dot_kernel(
    a,
    b,
    total,
    seqlen,
    stride_ab,
    stride_as,
    stride_ah,
    stride_bb,
    stride_bs,
    stride_bh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """total[b, h, s] = a . b of every row, in fp32."""
    start = tl.program_id(0) * BLOCK_S
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p_a = a + i_b * stride_ab + i_h * stride_ah
    p_b = b + i_b * stride_bb + i_h * stride_bh
    b_a = load_tile(p_a, start, seqlen, stride_as, BLOCK_S, HEAD_DIM, BLOCK_D, False)
    b_b = load_tile(p_b, start, seqlen, stride_bs, BLOCK_S, HEAD_DIM, BLOCK_D, False)
    o_s = start + tl.arange(0, BLOCK_S)
    i_row = (i_b * tl.num_programs(1) + i_h) * seqlen
    b_total = tl.sum(b_a.to(tl.float32) * b_b.to(tl.float32), 1)
    tl.store(total + i_row + o_s, b_total, mask=o_s < seqlen)

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

from lcdist_kernels.softmax_steps import (
    finish_softmax,
    fwd_step,
    load_limits,
    load_range,
    merge_partials,
    nth_masked,
)
from lcdist_kernels.triton_common import LOWEST, load_tile, store_tile


@triton.jit
def program_coords(tiles, stride, nheads):
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
def _fwd_all(
    b_q, b_out, b_max, b_sum, p_k, p_u, lo, size_k, step_k, step_u, qk_scale, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key tiles from the lo on, all seen by all queries."""
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    whole = tl.maximum(size_k // BLOCK_N, lo)
    for i in range(0, whole - lo):
        b_out, b_max, b_sum = fwd_step(
            b_q, b_out, b_max, b_sum, p_k, p_u, lo + i, size_k, step_k, step_u, qk_scale, b_all,
            b_all, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False,
        )  # fmt: skip
    for i in range(0, tl.cdiv(size_k, BLOCK_N) - whole):
        b_out, b_max, b_sum = fwd_step(
            b_q, b_out, b_max, b_sum, p_k, p_u, whole + i, size_k, step_k, step_u, qk_scale, b_all,
            b_all, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, True,
        )  # fmt: skip
    return b_out, b_max, b_sum


@triton.jit
def _tensorized_fwd_kernel(
    q, k, u, prev_out, prev_lse, out, lse, u_next, hop_lse, bias,
    q_idx, q_lo, k_idx, ranges, before,
    qk_scale, size_q, size_k, stride, outers, nheads, seqlen,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_ub, stride_us, stride_uh, stride_pb, stride_ps, stride_ph,
    stride_ob, stride_os, stride_oh, stride_u_next_b, stride_u_next_s, stride_u_next_h,
    GROUP_K: tl.constexpr, GROUP_U: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, BRANCH: tl.constexpr,
    HOP: tl.constexpr, MERGE: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """prev_out: the partial of finer branches, of p's strides; bias: of this branch, a head each.

    before (BEFORE): how many whole blocks before its own each block's branch sees.
    """
    tiles = tl.cdiv(size_q, BLOCK_M)
    i_m, i_h, i_r, i_o = program_coords(tiles, stride, nheads)
    # Late queries have most keys of a branch: they start lo.
    i_m = tiles - 1 - i_m
    i_b, i_o = i_o // outers, i_o % outers
    # Tokens of the fibre: row + i * stride.
    row_q = i_o * size_q * stride + i_r
    row_k = i_o * size_k * stride + i_r
    i_row = (i_b * nheads + i_h) * seqlen + row_q
    p_q = q + i_b * stride_qb + i_h * stride_qh + row_q * stride_qs
    p_k = k + i_b * stride_kb + (i_h // GROUP_K) * stride_kh + row_k * stride_ks
    p_u = u + i_b * stride_ub + (i_h // GROUP_U) * stride_uh + row_k * stride_us
    stride64 = tl.cast(stride, tl.int64)
    step_q, step_k, step_u = stride_qs * stride64, stride_ks * stride64, stride_us * stride64

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < size_q
    o_row = i_row + o_m.to(tl.int64) * stride
    b_q = load_tile(p_q, start, size_q, step_q, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    # A hop sees every key there is, a query that is not there what it likes.
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    hop_lo = 0
    if BRANCH:
        b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, HAS_LO)
        lo, full_lo, full_hi, hi = load_range(ranges, i_m)
        for i in range(0, full_hi - full_lo):
            b_out, b_max, b_sum = fwd_step(
                b_q, b_out, b_max, b_sum, p_k, p_u, full_lo + i, size_k, step_k, step_u, qk_scale,
                b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, False,
            )  # fmt: skip
        hop_out, hop_max, hop_sum = b_out, b_max, b_sum
        for i in range(0, (full_lo - lo) + (hi - full_hi)):
            i_n = nth_masked(i, lo, full_lo, full_hi)
            b_out, b_max, b_sum = fwd_step(
                b_q, b_out, b_max, b_sum, p_k, p_u, i_n, size_k, step_k, step_u, qk_scale, b_q_idx,
                b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, True,
            )  # fmt: skip
            if HOP:
                # The same tile and scores: the compiler computes what they share once.
                hop_out, hop_max, hop_sum = fwd_step(
                    b_q, hop_out, hop_max, hop_sum, p_k, p_u, i_n, size_k, step_k, step_u, qk_scale,
                    b_all, b_all, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, True,
                )  # fmt: skip
        hop_lo = tl.maximum(hi, full_hi)
        if BEFORE:
            # The blocks just before this one, one run of rows, all of it in the past.
            rows_before = tl.load(before + i_o) * size_k
            b_out, b_max, b_sum = _fwd_all(
                b_q, b_out, b_max, b_sum, p_k - rows_before * step_k, p_u - rows_before * step_u, 0,
                rows_before, step_k, step_u, qk_scale, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
        if MERGE:
            b_lse += tl.load(bias + i_h)
            b_prev_lse = tl.load(prev_lse + o_row, mask=m_m, other=0.0)
            p_prev = prev_out + i_b * stride_pb + i_h * stride_ph + row_q * stride_ps
            b_prev_out = load_tile(
                p_prev, start, size_q, stride_ps * stride64, BLOCK_M, HEAD_DIM, BLOCK_D, False
            )
            b_out, b_lse = merge_partials(b_out, b_lse, b_prev_out, b_prev_lse)
        p_out = out + i_b * stride_ob + i_h * stride_oh + row_q * stride_os
        store_tile(p_out, b_out, start, size_q, stride_os * stride64, BLOCK_M, HEAD_DIM, BLOCK_D)
        tl.store(lse + o_row, b_lse, mask=m_m)
        b_out, b_max, b_sum = hop_out, hop_max, hop_sum
    if HOP:
        b_out, b_max, b_sum = _fwd_all(
            b_q, b_out, b_max, b_sum, p_k, p_u, hop_lo, size_k, step_k, step_u, qk_scale, k_idx,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        b_out, b_hop_lse = finish_softmax(b_out, b_max, b_sum)
        p_u_next = u_next + i_b * stride_u_next_b + i_h * stride_u_next_h + row_q * stride_u_next_s
        store_tile(
            p_u_next, b_out, start, size_q, stride_u_next_s * stride64, BLOCK_M, HEAD_DIM, BLOCK_D
        )
        tl.store(hop_lse + o_row, b_hop_lse, mask=m_m)


@triton.jit
def _row_dot_kernel(
    a, b, total,
    seqlen,
    stride_ab, stride_as, stride_ah, stride_bb, stride_bs, stride_bh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """total[b, h, s] = a . b of every row, in fp32."""
    start = tl.program_id(0) * BLOCK_S
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p_a = a + i_b * stride_ab + i_h * stride_ah
    p_b = b + i_b * stride_bb + i_h * stride_bh
    b_a = load_tile(p_a, start, seqlen, stride_as, BLOCK_S, HEAD_DIM, BLOCK_D, False)
    b_b = load_tile(p_b, start, seqlen, stride_bs, BLOCK_S, HEAD_DIM, BLOCK_D, False)
    o_s = start + tl.arange(0, BLOCK_S)
    i_row = (i_b * tl.num_programs(1) + i_h) * seqlen
    b_sum = tl.sum(b_a.to(tl.float32) * b_b.to(tl.float32), 1)
    tl.store(total + i_row + o_s, b_sum, mask=o_s < seqlen)

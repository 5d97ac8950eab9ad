"""Landmark attention in Triton: partials over whole blocks, past ones and each query's own.

The formulas are in `block_gates`, the steps in `inner_loop`; the keys of a query's own block are
plain softmax entries, as in full attention (arXiv:2305.16300; arXiv:2307.08691).

Shapes: q, out, dout, dq `[b, s_q, h, d]`; k, v, dk, dv `[b, n SIZE, h_kv, d]`, n blocks; lse, lse2
= lse log2(e), delta `[b, h, s_q]`; q_last, q_lo, own_last, own_lo int32 `[s_q]`: (last, first) slot
that a past block may begin at, and slots visible in the own block; k_start int32 `[n]`; k_idx int32
`[n SIZE]`.

                  blocks 0 ................... n - 1      fwd, dq: a program is a row,
                 +------+------+------+------+------+              grid (query tiles, h, b)
    queries,     | own  |      |      |      |      |     dkv:     a program is a column: BLOCKS
    tiles of     +------+------+------+------+------+              whole blocks, or one of STEPS
    BLOCK_M      | past | own  |      |      |      |              parts of a large one, grid
                 +------+------+------+------+------+              (parts, h_kv, b), loops over
                 | past | past | own  |      |      |              the heads of a group
                 +------+------+------+------+------+

    past   one softmax entry per block, gated by its landmark
    own    one softmax entry per key, causal, without the landmark

Nothing is added atomically: the same inputs give the same bits. A negligible gate is not skipped,
as that would need the scores of all rows of a tile before its loads.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from lcdist_kernels.landmark.inner_loop import (
    block_softmax,
    grads_of_gates,
    large_dkv,
    large_dq,
    large_fwd,
    own_dkv,
    past_dkv,
    past_dq,
    past_fwd,
    to_columns,
    weigh_blocks,
)
from lcdist_kernels.softmax_steps import (
    finish_softmax,
    hide_keys,
    is_visible,
    key_program,
    load_key_numbers,
    load_limits,
    load_lse,
    load_pair,
    load_query_tile,
    load_range,
    loop_sources,
    nth_masked,
    part_of,
    query_program,
    store_delta,
    weigh,
)
from lcdist_kernels.triton_common import (
    LOG2E,
    LOWEST,
    dot,
    load_box,
    load_rows,
    load_tile,
    store_rows,
    store_tile,
)


@triton.jit
def _load_block_tile(
    p_k, p_v, i_n, num_blocks, stride_ks, stride_vs,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return keys and values of tile i_n of small blocks, and each column's place in its block."""
    o_n = tl.arange(0, BLOCK_N)
    o_in = o_n % WIDTH
    o_row = ((o_n // WIDTH) * SIZE + o_in).to(tl.int64)
    m_row = o_in < SIZE
    if MASKED:
        m_row = m_row & (i_n * BLOCKS + o_n // WIDTH < num_blocks)
    # In a loop only the scalar `row` changes; the tile's own offsets are loop invariant.
    row = i_n.to(tl.int64) * (BLOCKS * SIZE)
    ALL: tl.constexpr = (not MASKED) and SIZE == WIDTH
    b_k = load_rows(p_k + row * stride_ks, o_row * stride_ks, m_row, HEAD_DIM, BLOCK_D, ALL)
    b_v = load_rows(p_v + row * stride_vs, o_row * stride_vs, m_row, HEAD_DIM, BLOCK_D, ALL)
    return b_k, b_v, o_in


@triton.jit
def _past_visible(
    q_last, q_lo, k_start, i_n, num_blocks,
    BLOCKS: tl.constexpr, HAS_LO: tl.constexpr,
):  # fmt: skip
    """Return which of a tile's blocks the queries look back at, bool `[BLOCK_M, BLOCKS]`."""
    o_b = i_n * BLOCKS + tl.arange(0, BLOCKS)
    b_start = tl.load(k_start + o_b, mask=o_b < num_blocks, other=2147483647)
    return is_visible(q_last[:, None], q_lo[:, None], b_start[None, :], HAS_LO)


@triton.jit
def _past_fwd_step(
    b_q, b_out, b_max, b_sum, p_k, p_v, i_n, num_blocks, stride_ks, stride_vs, qk_scale, b_q_last,
    b_q_lo, k_start,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) after tile i_n of past blocks, small or large."""
    if STEPS == 1:
        b_k, b_v, o_in = _load_block_tile(
            p_k, p_v, i_n, num_blocks, stride_ks, stride_vs, SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
            BLOCKS, WIDTH, MASKED,
        )  # fmt: skip
        m_visible = b_max
        if MASKED:
            m_visible = _past_visible(b_q_last, b_q_lo, k_start, i_n, num_blocks, BLOCKS, HAS_LO)
        b_out, b_max, b_sum = past_fwd(
            b_q, b_k, b_v, b_out, b_max, b_sum, o_in, m_visible, qk_scale, SIZE, BLOCK_M, BLOCK_N,
            BLOCKS, WIDTH, MASKED,
        )  # fmt: skip
    else:
        row = i_n.to(tl.int64) * SIZE
        m_visible = b_max
        if MASKED:
            m_visible = is_visible(b_q_last, b_q_lo, tl.load(k_start + i_n), HAS_LO)
        b_out, b_max, b_sum = large_fwd(
            b_q, p_k + row * stride_ks, p_v + row * stride_vs, b_out, b_max, b_sum, stride_ks,
            stride_vs, m_visible, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STEPS,
            MASKED,
        )  # fmt: skip
    return b_out, b_max, b_sum


@triton.jit
def _past_fwd_loop(
    b_q, k, v, at, lo, full_lo, full_hi, hi, num_blocks, stride_ks, stride_vs, qk_scale, b_q_last,
    b_q_lo, k_start,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) after tiles lo to hi of past blocks.

    k, v, at: as `loop_sources` returns them. Tiles in [full_lo, full_hi) need no mask; by
    descriptors every tile has one, of a few blocks and rows, as a jump over it would cost spills.
    Values are added one tile later then, while the next tile's softmax is computed, as in
    `softmax_steps.fwd_loop`.
    """
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if DESCRIBED:
        o_in = tl.arange(0, BLOCK_N) % WIDTH
        b_rescale = tl.zeros([BLOCK_M], tl.float32)
        b_p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b_factor = tl.zeros([BLOCK_M, BLOCKS], tl.float32)
        for i in range(lo, hi):
            b_k = load_box(k, at, i * BLOCK_N, BLOCK_N, BLOCK_D)
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_v = load_box(v, at, tl.maximum(i - 1, lo) * BLOCK_N, BLOCK_N, BLOCK_D)
            b_p = b_p * to_columns(b_factor, BLOCK_M, BLOCKS, WIDTH)
            b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
            b_p, b_block_sum, b_x = block_softmax(b_s, o_in, qk_scale, SIZE, BLOCK_M, BLOCKS, WIDTH)
            m_visible = _past_visible(b_q_last, b_q_lo, k_start, i, num_blocks, BLOCKS, HAS_LO)
            b_x = tl.where(m_visible, b_x, float("-inf"))
            b_factor, b_rescale, b_max, b_sum = weigh_blocks(b_x, b_block_sum, b_max, b_sum)
        if hi > lo:
            b_v = load_box(v, at, (hi - 1) * BLOCK_N, BLOCK_N, BLOCK_D)
            b_p = b_p * to_columns(b_factor, BLOCK_M, BLOCKS, WIDTH)
            b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(0, stop - first):
                b_out, b_max, b_sum = _past_fwd_step(
                    b_q, b_out, b_max, b_sum, k, v, first + i, num_blocks, stride_ks, stride_vs,
                    qk_scale, b_q_last, b_q_lo, k_start, SIZE, BLOCKS, WIDTH, STEPS, HEAD_DIM,
                    BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, part != 1,
                )  # fmt: skip
    return b_out, b_max, b_sum


@triton.jit
def _landmark_fwd_kernel(
    q, k, v, out, lse,
    q_last, q_lo, k_start, past_ranges, own_last, own_lo, k_idx, own_ranges,
    qk_scale, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of a tile of queries. DESCRIBED: k and v are descriptors."""
    i_m, i_h, i_b, i_row = query_program(seqlen_q)
    k, v, at = loop_sources(
        k, v, i_b, i_h // GROUP, 0, 1, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
        stride_vh, DESCRIBED,
    )  # fmt: skip
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_out = out + i_b * stride_ob + i_h * stride_oh
    num_blocks = seqlen_k // SIZE

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_q = load_tile(p_q, start, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_q_last, b_q_lo = load_limits(q_last, q_lo, o_m, m_m, HAS_LO)
    b_own_last, b_own_lo = load_limits(own_last, own_lo, o_m, m_m, True)
    lo, full_lo, full_hi, hi = load_range(past_ranges, i_m)
    b_out, b_max, b_sum = _past_fwd_loop(
        b_q, k, v, at, lo, full_lo, full_hi, hi, num_blocks, stride_ks, stride_vs, qk_scale,
        b_q_last, b_q_lo, k_start, SIZE, BLOCKS, WIDTH, STEPS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        HAS_LO, DESCRIBED,
    )  # fmt: skip
    lo, _, _, hi = load_range(own_ranges, i_m)
    for i in range(lo, hi):
        o_n = i * BLOCK_N
        b_k, b_v = load_pair(
            k, v, at, o_n, seqlen_k, stride_ks, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_N, False,
            DESCRIBED,
        )  # fmt: skip
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_s = hide_keys(b_s, o_n, seqlen_k, b_own_last, b_own_lo, k_idx, BLOCK_N, True)
        b_p, b_rescale, b_max, b_sum = weigh(b_s, b_max, b_sum, qk_scale)
        b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
    b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
    tl.store(lse + i_row + o_m, b_lse, mask=m_m)
    store_tile(p_out, b_out, start, seqlen_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _past_dq_step(
    b_q, b_dout, b_dq, b_lse, b_delta, p_k, p_v, i_n, num_blocks, stride_ks, stride_vs, qk_scale,
    b_q_last, b_q_lo, k_start,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return dq, without softmax_scale, after tile i_n of past blocks."""
    if STEPS == 1:
        b_k, b_v, o_in = _load_block_tile(
            p_k, p_v, i_n, num_blocks, stride_ks, stride_vs, SIZE, HEAD_DIM, BLOCK_D, BLOCK_N,
            BLOCKS, WIDTH, MASKED,
        )  # fmt: skip
        m_visible = b_lse
        if MASKED:
            m_visible = _past_visible(b_q_last, b_q_lo, k_start, i_n, num_blocks, BLOCKS, HAS_LO)
        b_dq = past_dq(
            b_q, b_dout, b_dq, b_lse, b_delta, b_k, b_v, o_in, m_visible, qk_scale, SIZE, BLOCK_M,
            BLOCK_N, BLOCKS, WIDTH, MASKED,
        )  # fmt: skip
    else:
        row = i_n.to(tl.int64) * SIZE
        m_visible = b_lse
        if MASKED:
            m_visible = is_visible(b_q_last, b_q_lo, tl.load(k_start + i_n), HAS_LO)
        b_dq = large_dq(
            b_q, b_dout, b_dq, b_lse, b_delta, p_k + row * stride_ks, p_v + row * stride_vs,
            stride_ks, stride_vs, m_visible, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            STEPS, MASKED,
        )  # fmt: skip
    return b_dq


@triton.jit
def _past_dq_loop(
    b_q, b_dout, b_lse, b_delta, k, v, at, lo, full_lo, full_hi, hi, num_blocks, stride_ks,
    stride_vs, qk_scale, b_q_last, b_q_lo, k_start,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return dq, without softmax_scale, after tiles lo to hi of past blocks."""
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DESCRIBED:
        o_in = tl.arange(0, BLOCK_N) % WIDTH
        for i in range(lo, hi):
            b_k = load_box(k, at, i * BLOCK_N, BLOCK_N, BLOCK_D)
            b_v = load_box(v, at, i * BLOCK_N, BLOCK_N, BLOCK_D)
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_du = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_p, b_block_sum, b_x = block_softmax(b_s, o_in, qk_scale, SIZE, BLOCK_M, BLOCKS, WIDTH)
            b_gate = tl.exp2(b_x - b_lse[:, None])
            if (i < full_lo) | (i >= full_hi):
                m_visible = _past_visible(b_q_last, b_q_lo, k_start, i, num_blocks, BLOCKS, HAS_LO)
                b_gate = tl.where(m_visible, b_gate, 0.0)
            _, b_ds = grads_of_gates(
                b_p, b_block_sum, b_gate, b_du, b_delta, o_in, SIZE, BLOCK_M, BLOCKS, WIDTH
            )
            b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(0, stop - first):
                b_dq = _past_dq_step(
                    b_q, b_dout, b_dq, b_lse, b_delta, k, v, first + i, num_blocks, stride_ks,
                    stride_vs, qk_scale, b_q_last, b_q_lo, k_start, SIZE, BLOCKS, WIDTH, STEPS,
                    HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, part != 1,
                )  # fmt: skip
    return b_dq


@triton.jit
def _landmark_bwd_dq_kernel(
    q, k, v, out, dout, lse, delta, lse2, dq,
    q_last, q_lo, k_start, past_ranges, own_last, own_lo, k_idx, own_ranges,
    softmax_scale, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    stride_dout_b, stride_dout_s, stride_dout_h, stride_db, stride_ds, stride_dh,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries, and delta and lse2, which the kernel for dk and dv reads.

    DESCRIBED: k and v are descriptors.
    """
    i_m, i_h, i_b, i_row = query_program(seqlen_q)
    k, v, at = loop_sources(
        k, v, i_b, i_h // GROUP, 0, 1, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
        stride_vh, DESCRIBED,
    )  # fmt: skip
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_out = out + i_b * stride_ob + i_h * stride_oh
    p_dout = dout + i_b * stride_dout_b + i_h * stride_dout_h
    p_dq = dq + i_b * stride_db + i_h * stride_dh
    num_blocks = seqlen_k // SIZE

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_dout, b_delta = store_delta(
        p_out, p_dout, delta + i_row, start, seqlen_q, stride_os, stride_dout_s, HEAD_DIM, BLOCK_D,
        BLOCK_M,
    )  # fmt: skip
    b_q = load_tile(p_q, start, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_lse = load_lse(lse + i_row, lse2 + i_row, o_m, m_m)
    b_q_last, b_q_lo = load_limits(q_last, q_lo, o_m, m_m, HAS_LO)
    b_own_last, b_own_lo = load_limits(own_last, own_lo, o_m, m_m, True)
    qk_scale = softmax_scale * LOG2E
    lo, full_lo, full_hi, hi = load_range(past_ranges, i_m)
    b_dq = _past_dq_loop(
        b_q, b_dout, b_lse, b_delta, k, v, at, lo, full_lo, full_hi, hi, num_blocks, stride_ks,
        stride_vs, qk_scale, b_q_last, b_q_lo, k_start, SIZE, BLOCKS, WIDTH, STEPS, HEAD_DIM,
        BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, DESCRIBED,
    )  # fmt: skip
    lo, _, _, hi = load_range(own_ranges, i_m)
    for i in range(lo, hi):
        o_n = i * BLOCK_N
        b_k, b_v = load_pair(
            k, v, at, o_n, seqlen_k, stride_ks, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_N, False,
            DESCRIBED,
        )  # fmt: skip
        b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_k_idx = load_key_numbers(k_idx, o_n + tl.arange(0, BLOCK_N), seqlen_k)
        m_s = is_visible(b_own_last[:, None], b_own_lo[:, None], b_k_idx[None, :], True)
        # Masked after the exponential: a row that saw nothing anywhere has lse = -inf.
        b_p = tl.where(m_s, tl.exp2(b_s * qk_scale - b_lse[:, None]), 0.0)
        b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    b_dq = b_dq * softmax_scale
    store_tile(p_dq, b_dq, start, seqlen_q, stride_ds, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _past_dkv_step(
    b_k, b_v, b_dk, b_dv, p_q, p_dout, p_lse, p_delta, i_m, seqlen_q, stride_qs, stride_dout_s,
    qk_scale, q_last, q_lo, b_start, o_in, p_block_k, p_block_v, stride_ks, stride_vs,
    SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, EVEN_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) after tile i_m of queries that look back at the blocks."""
    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_q, b_dout, b_lse, b_delta = load_query_tile(
        p_q, p_dout, None, p_lse, p_delta, start, seqlen_q, stride_qs, stride_dout_s, HEAD_DIM,
        BLOCK_D, BLOCK_M, EVEN_M, False,
    )  # fmt: skip
    m_visible = b_lse
    if MASKED:
        b_q_last, b_q_lo = load_limits(q_last, q_lo, o_m, m_m, HAS_LO)
        if STEPS == 1:
            m_visible = is_visible(b_q_last[:, None], b_q_lo[:, None], b_start[None, :], HAS_LO)
        else:
            m_visible = is_visible(b_q_last, b_q_lo, b_start, HAS_LO)
    if STEPS == 1:
        b_dk, b_dv = past_dkv(
            b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, o_in, m_visible, qk_scale, SIZE,
            BLOCK_M, BLOCK_N, BLOCKS, WIDTH, MASKED,
        )  # fmt: skip
    else:
        b_dk, b_dv = large_dkv(
            b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, o_in, p_block_k, p_block_v,
            stride_ks, stride_vs, m_visible, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            STEPS, MASKED,
        )  # fmt: skip
    return b_dk, b_dv


@triton.jit
def _own_dkv_step(
    b_k, b_v, b_dk, b_dv, p_q, p_dout, p_lse, p_delta, i_m, seqlen_q, stride_qs, stride_dout_s,
    qk_scale, own_last, own_lo, b_k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) after tile i_m of queries inside their own block; queries are rows."""
    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_q, b_dout, b_lse, b_delta = load_query_tile(
        p_q, p_dout, None, p_lse, p_delta, start, seqlen_q, stride_qs, stride_dout_s, HEAD_DIM,
        BLOCK_D, BLOCK_M, EVEN_M, False,
    )  # fmt: skip
    b_last, b_lo = load_limits(own_last, own_lo, o_m, m_m, True)
    m_visible = is_visible(b_last[:, None], b_lo[:, None], b_k_idx[None, :], True)
    return own_dkv(
        b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, m_visible, qk_scale, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit
def _landmark_bwd_dkv_kernel(
    q, k, v, dout, lse2, delta, dk, dv,
    q_last, q_lo, k_start, past_ranges, own_last, own_lo, k_idx, own_ranges,
    softmax_scale, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_dout_b, stride_dout_s, stride_dout_h,
    stride_db, stride_ds, stride_dh,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, EVEN_M: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of whole blocks, or of part i_n % STEPS of one; one layout for both."""
    i_n = tl.program_id(0)
    i_hk, i_b, p_k, p_v = key_program(k, v, stride_kb, stride_kh, stride_vb, stride_vh)
    i_t = i_n // STEPS
    num_blocks = seqlen_k // SIZE
    o_n = tl.arange(0, BLOCK_N)
    o_in = (i_n % STEPS) * BLOCK_N + o_n % WIDTH
    o_block = i_t * BLOCKS + o_n // WIDTH
    m_n = (o_in < SIZE) & (o_block < num_blocks)
    o_row = o_block.to(tl.int64) * SIZE + o_in
    b_k = load_rows(p_k, o_row * stride_ks, m_n, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_v, o_row * stride_vs, m_n, HEAD_DIM, BLOCK_D)
    b_k_idx = tl.load(k_idx + o_row, mask=m_n, other=2147483647)
    i_block = i_t.to(tl.int64) * SIZE
    if STEPS == 1:
        o_b = i_t * BLOCKS + tl.arange(0, BLOCKS)
        b_start = tl.load(k_start + o_b, mask=o_b < num_blocks, other=2147483647)
    else:
        b_start = tl.load(k_start + i_t)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2E
    lo, full_lo, full_hi, hi = load_range(past_ranges, i_t)
    own_tile_lo, _, _, own_tile_hi = load_range(own_ranges, i_t)
    for i_g in range(0, GROUP):
        i_h = i_hk * GROUP + i_g
        i_row = (i_b * (tl.num_programs(1) * GROUP) + i_h) * seqlen_q
        p_q = q + i_b * stride_qb + i_h * stride_qh
        p_dout = dout + i_b * stride_dout_b + i_h * stride_dout_h
        for i in range(0, own_tile_hi - own_tile_lo):
            b_dk, b_dv = _own_dkv_step(
                b_k, b_v, b_dk, b_dv, p_q, p_dout, lse2 + i_row, delta + i_row, own_tile_lo + i,
                seqlen_q, stride_qs, stride_dout_s, qk_scale, own_last, own_lo, b_k_idx, HEAD_DIM,
                BLOCK_D, BLOCK_M, BLOCK_N, EVEN_M,
            )  # fmt: skip
        for i in range(0, full_hi - full_lo):
            b_dk, b_dv = _past_dkv_step(
                b_k, b_v, b_dk, b_dv, p_q, p_dout, lse2 + i_row, delta + i_row, full_lo + i,
                seqlen_q, stride_qs, stride_dout_s, qk_scale, q_last, q_lo, b_start, o_in,
                p_k + i_block * stride_ks, p_v + i_block * stride_vs, stride_ks, stride_vs, SIZE,
                BLOCKS, WIDTH, STEPS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, False,
            )  # fmt: skip
        for i in range(0, (full_lo - lo) + (hi - full_hi)):
            i_m = nth_masked(i, lo, full_lo, full_hi)
            b_dk, b_dv = _past_dkv_step(
                b_k, b_v, b_dk, b_dv, p_q, p_dout, lse2 + i_row, delta + i_row, i_m, seqlen_q,
                stride_qs, stride_dout_s, qk_scale, q_last, q_lo, b_start, o_in,
                p_k + i_block * stride_ks, p_v + i_block * stride_vs, stride_ks, stride_vs, SIZE,
                BLOCKS, WIDTH, STEPS, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, True,
            )  # fmt: skip
    i_own = i_b * stride_db + i_hk * stride_dh
    o_at = o_row * stride_ds
    store_rows(dk + i_own, b_dk * softmax_scale, o_at, m_n, HEAD_DIM, BLOCK_D)
    store_rows(dv + i_own, b_dv, o_at, m_n, HEAD_DIM, BLOCK_D)

"""Landmark attention over lists of past blocks in Triton: partials of what each unit names.

The formulas are in `block_gates`, the steps in `inner_loop`.

Shapes: q, out, dout, dq `[b, s, h, d]`; table, dtable `[m, 2, SIZE, d]`, m blocks of one key head
each; ids int32 `[b, h_kv, units, K]`, -1 for none; stops `[b, h_kv, units]`: length of each list;
begins `[m]`: first slot of each entry; q_last `[s]`: last slot a past block may begin at; lse,
delta `[b, h, s]`.

                         lists, K entries each          fwd, dq: a program is some rows of one
    unit 0   [row 0..]   | e5 | e2 | e9 | -1 |                   unit times the heads of a group,
    unit 1   [row n..]   | e5 | e1 | -1 | -1 |                   grid (row tiles, h_kv, b); it walks
    unit 2   ...         | e2 | e7 | e3 | e8 |                   the unit's list from left to right
                                                        dtable:  a program is an entry e, or one of
                                                                 STEPS parts of it, grid (m STEPS,);
                                                                 it walks the units that name e

The inverse of the lists has these units in order and nothing is added atomically, so the same
inputs give the same bits.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl

from lcdist_kernels.landmark.inner_loop import (
    large_dkv,
    large_dq,
    large_fwd,
    load_rows,
    past_dkv,
    past_dq,
    past_fwd,
    store_rows,
)
from lcdist_kernels.softmax_steps import (
    finish_softmax,
)
from lcdist_kernels.triton_common import LOG2E, LOWEST


@triton.jit
def _rows_of(first, count, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (token, head in the group, mask) of a tile's rows: each token once per head."""
    o_m = tl.arange(0, BLOCK_M)
    return first + o_m // GROUP, o_m % GROUP, o_m // GROUP < count


@triton.jit
def _load_blocks(
    table, p_ids, i, num_ids, begins, stride_te, stride_tv, stride_ts,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return keys and values of BLOCKS entries of a list, places in them, and block begins.

    i: number of the group of BLOCKS entries.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_in, o_id = o_n % WIDTH, i * BLOCKS + o_n // WIDTH
    b_id = tl.load(p_ids + o_id, mask=o_id < num_ids, other=-1)
    m_row = (b_id >= 0) & (o_in < SIZE)
    o_at = b_id.to(tl.int64) * stride_te + o_in.to(tl.int64) * stride_ts
    b_k = load_rows(table, o_at, m_row, HEAD_DIM, BLOCK_D)
    b_v = load_rows(table + stride_tv, o_at, m_row, HEAD_DIM, BLOCK_D)
    o_id = i * BLOCKS + tl.arange(0, BLOCKS)
    b_id = tl.load(p_ids + o_id, mask=o_id < num_ids, other=-1)
    b_begin = tl.load(begins + b_id, mask=b_id >= 0, other=2147483647)
    return b_k, b_v, o_in, b_begin


@triton.jit
def _sparse_fwd_kernel(
    q, table, out, lse,
    ids, stops, begins, q_last, tiles,
    qk_scale, seqlen_q, num_units, num_ids,
    stride_qb, stride_qs, stride_qh, stride_te, stride_tv, stride_ts,
    stride_ob, stride_os, stride_oh,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of some rows of one unit.

    tiles: int32 `[n, 3]`: a unit, the first of its rows in the tile, and their number.
    """
    # Late units have the most blocks, so they start first.
    p_tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    i_hk = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_head = i_b * tl.num_programs(1) + i_hk
    i_unit = i_head * num_units + tl.load(p_tile)
    p_ids = ids + i_unit * num_ids
    stop = tl.load(stops + i_unit)
    o_s, o_g, m_m = _rows_of(tl.load(p_tile + 1), tl.load(p_tile + 2), GROUP, BLOCK_M)
    o_h = i_hk * GROUP + o_g
    o_s = o_s.to(tl.int64)
    p_q = q + i_b * stride_qb
    b_q = load_rows(p_q, o_s * stride_qs + o_h * stride_qh, m_m, HEAD_DIM, BLOCK_D)
    b_q_last = tl.load(q_last + o_s, mask=m_m, other=-2147483648)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, (stop + BLOCKS - 1) // BLOCKS):
        if STEPS == 1:
            b_k, b_v, o_in, b_begin = _load_blocks(
                table, p_ids, i, num_ids, begins, stride_te, stride_tv, stride_ts, SIZE, HEAD_DIM,
                BLOCK_D, BLOCK_N, BLOCKS, WIDTH,
            )  # fmt: skip
            m_visible = b_begin[None, :] <= b_q_last[:, None]
            b_out, b_max, b_sum = past_fwd(
                b_q, b_k, b_v, b_out, b_max, b_sum, o_in, m_visible, qk_scale, SIZE, BLOCK_M,
                BLOCK_N, BLOCKS, WIDTH, True,
            )  # fmt: skip
        else:
            i_e = tl.load(p_ids + i)
            b_begin = tl.load(begins + i_e, mask=i_e >= 0, other=2147483647)
            p_k = table + tl.maximum(i_e, 0).to(tl.int64) * stride_te
            b_out, b_max, b_sum = large_fwd(
                b_q, p_k, p_k + stride_tv, b_out, b_max, b_sum, stride_ts, stride_ts,
                b_begin <= b_q_last, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STEPS,
                True,
            )  # fmt: skip
    b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
    o_row = (i_head * GROUP + o_g) * seqlen_q + o_s
    tl.store(lse + o_row, b_lse, mask=m_m)
    p_out = out + i_b * stride_ob
    store_rows(p_out, b_out, o_s * stride_os + o_h * stride_oh, m_m, HEAD_DIM, BLOCK_D)


@triton.jit
def _sparse_bwd_dq_kernel(
    q, table, out, dout, lse, delta, dq,
    ids, stops, begins, q_last, tiles,
    softmax_scale, seqlen_q, num_units, num_ids,
    stride_qb, stride_qs, stride_qh, stride_te, stride_tv, stride_ts,
    stride_ob, stride_os, stride_oh, stride_dout_b, stride_dout_s, stride_dout_h,
    stride_db, stride_ds, stride_dh,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dq of some rows of one unit, and delta, which the kernel for dtable reads."""
    p_tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    i_hk = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_head = i_b * tl.num_programs(1) + i_hk
    i_unit = i_head * num_units + tl.load(p_tile)
    p_ids = ids + i_unit * num_ids
    stop = tl.load(stops + i_unit)
    o_s, o_g, m_m = _rows_of(tl.load(p_tile + 1), tl.load(p_tile + 2), GROUP, BLOCK_M)
    o_h = i_hk * GROUP + o_g
    o_s = o_s.to(tl.int64)
    o_row = (i_head * GROUP + o_g) * seqlen_q + o_s
    o_out = i_b * stride_ob + o_s * stride_os + o_h * stride_oh
    b_out = load_rows(out, o_out, m_m, HEAD_DIM, BLOCK_D)
    o_dout = i_b * stride_dout_b + o_s * stride_dout_s + o_h * stride_dout_h
    b_dout = load_rows(dout, o_dout, m_m, HEAD_DIM, BLOCK_D)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    tl.store(delta + o_row, b_delta, mask=m_m)
    o_q = i_b * stride_qb + o_s * stride_qs + o_h * stride_qh
    b_q = load_rows(q, o_q, m_m, HEAD_DIM, BLOCK_D)
    b_lse = tl.load(lse + o_row, mask=m_m, other=float("inf")) * LOG2E
    b_q_last = tl.load(q_last + o_s, mask=m_m, other=-2147483648)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2E
    for i in range(0, (stop + BLOCKS - 1) // BLOCKS):
        if STEPS == 1:
            b_k, b_v, o_in, b_begin = _load_blocks(
                table, p_ids, i, num_ids, begins, stride_te, stride_tv, stride_ts, SIZE, HEAD_DIM,
                BLOCK_D, BLOCK_N, BLOCKS, WIDTH,
            )  # fmt: skip
            m_visible = b_begin[None, :] <= b_q_last[:, None]
            b_dq = past_dq(
                b_q, b_dout, b_dq, b_lse, b_delta, b_k, b_v, o_in, m_visible, qk_scale, SIZE,
                BLOCK_M, BLOCK_N, BLOCKS, WIDTH, True,
            )  # fmt: skip
        else:
            i_e = tl.load(p_ids + i)
            b_begin = tl.load(begins + i_e, mask=i_e >= 0, other=2147483647)
            p_k = table + tl.maximum(i_e, 0).to(tl.int64) * stride_te
            b_dq = large_dq(
                b_q, b_dout, b_dq, b_lse, b_delta, p_k, p_k + stride_tv, stride_ts, stride_ts,
                b_begin <= b_q_last, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, STEPS,
                True,
            )  # fmt: skip
    o_dq = i_b * stride_db + o_s * stride_ds + o_h * stride_dh
    store_rows(dq, b_dq * softmax_scale, o_dq, m_m, HEAD_DIM, BLOCK_D)


@triton.jit
def _sparse_bwd_dtable_kernel(
    q, table, dout, lse, delta, dtable,
    readers, reader_starts, units, begins, q_last,
    softmax_scale, seqlen_q, num_units, num_ids, nheads_kv,
    stride_qb, stride_qs, stride_qh, stride_te, stride_tv, stride_ts,
    stride_dout_b, stride_dout_s, stride_dout_h,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one entry, or of a part of it; dtable is contiguous.

    readers: positions in ids that name an entry, those of entry e from reader_starts[e] on. units:
    int32 `[n, 2]`: the first row of each unit, and its number of rows.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    i_e = tl.program_id(0).to(tl.int64) // STEPS
    o_in = (tl.program_id(0) % STEPS) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_at = o_in.to(tl.int64) * stride_ts
    m_n = o_in < SIZE
    p_k = table + i_e * stride_te
    b_k = load_rows(p_k, o_at, m_n, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_k + stride_tv, o_at, m_n, HEAD_DIM, BLOCK_D)
    begin = tl.load(begins + i_e)
    first = tl.load(reader_starts + i_e)
    count = tl.load(reader_starts + i_e + 1) - first
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2E
    for i in range(0, count):
        i_unit = tl.load(readers + first + i) // num_ids
        i_head = i_unit // num_units
        i_b = i_head // nheads_kv
        p_unit = units + (i_unit % num_units) * 2
        start, length = tl.load(p_unit), tl.load(p_unit + 1)
        for i_m in range(0, (length + TOKENS - 1) // TOKENS):
            offset = i_m * TOKENS
            o_s, o_g, m_m = _rows_of(start + offset, length - offset, GROUP, BLOCK_M)
            # Where the group does not divide the tile, the last rows belong to the next tile.
            m_m = m_m & (tl.arange(0, BLOCK_M) < TOKENS * GROUP)
            o_s = o_s.to(tl.int64)
            o_h = (i_head % nheads_kv) * GROUP + o_g
            o_q = i_b * stride_qb + o_s * stride_qs + o_h * stride_qh
            b_q = load_rows(q, o_q, m_m, HEAD_DIM, BLOCK_D)
            o_dout = i_b * stride_dout_b + o_s * stride_dout_s + o_h * stride_dout_h
            b_dout = load_rows(dout, o_dout, m_m, HEAD_DIM, BLOCK_D)
            o_row = (i_head * GROUP + o_g) * seqlen_q + o_s
            b_lse = tl.load(lse + o_row, mask=m_m, other=float("inf")) * LOG2E
            b_delta = tl.load(delta + o_row, mask=m_m, other=0.0)
            b_q_last = tl.load(q_last + o_s, mask=m_m, other=-2147483648)
            m_visible = begin <= b_q_last
            if STEPS == 1:
                b_dk, b_dv = past_dkv(
                    b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, o_in, m_visible[:, None],
                    qk_scale, SIZE, BLOCK_M, BLOCK_N, BLOCKS, WIDTH, True,
                )  # fmt: skip
            else:
                b_dk, b_dv = large_dkv(
                    b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, o_in, p_k, p_k + stride_tv,
                    stride_ts, stride_ts, m_visible, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M,
                    BLOCK_N, STEPS, True,
                )  # fmt: skip
    p_d = dtable + i_e * (2 * SIZE * HEAD_DIM)
    o_at = o_in.to(tl.int64) * HEAD_DIM
    store_rows(p_d, b_dk * softmax_scale, o_at, m_n, HEAD_DIM, BLOCK_D)
    store_rows(p_d + SIZE * HEAD_DIM, b_dv, o_at, m_n, HEAD_DIM, BLOCK_D)

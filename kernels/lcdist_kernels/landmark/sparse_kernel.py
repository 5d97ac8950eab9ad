"""Landmark attention over lists of past blocks in Triton, with the own block or without.

The formulas are in `block_gates`, the steps in `inner_loop`.

Shapes: q, out, dout, dq `[b, s, h, d]`; lse, delta `[b, h, s]`; ids int32 `[b, h_kv, units, K]`, -1
for none; slots int32 `[s]`: slot of each row. LOCAL: k, v, dk, dv are all keys `[b, n SIZE, h_kv,
d]`, entry e is block e, and every row also sees its own block. Else they are entries of a table,
each of one key head, `[m, SIZE, d]`, with begins int32 `[m]`: the first slot of each entry. Either
way an element is found by the strides of batch, entry, token and head. CHUNK > 0: units are chunks
of CHUNK rows, with the lists, members and sizes of `union_kernel`, where nothing ends a list.

                         lists, K entries each          fwd, dq: a program is some rows of one
    unit 0   [row 0..]   | e5 | e2 | e9 | -1 |                   unit times the heads of a group,
    unit 1   [row n..]   | e5 | e1 | -1 | -1 |                   grid (row tiles, h_kv, b); it walks
    unit 2   ...         | e2 | e7 | e3 | e8 |                   the unit's list from left to right
                                                        dkv:     a program is an entry e, or one of
                                                                 STEPS parts of it, grid (n STEPS,
                                                                 h_kv, b) or (m STEPS, 1, 1); it
                                                                 walks the units that name e, or
                                                                 gathers the rows that read it

The inverse of the lists has these units in order and nothing is added atomically, so the same
inputs give the same bits.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

from lcdist_kernels.landmark.inner_loop import (
    large_dkv,
    large_dq,
    large_fwd,
    own_dkv,
    past_dkv,
    past_dq,
    past_fwd,
)
from lcdist_kernels.landmark.list_boxes import (
    begin_of,
    list_dq,
    list_fwd,
    own_block_dq,
    own_block_fwd,
    reads,
)
from lcdist_kernels.softmax_steps import (
    dq_step,
    finish_softmax,
    fwd_step,
)
from lcdist_kernels.triton_common import LOG2E, LOWEST, load_rows, store_rows


@triton.jit
def _rows_of(first, count, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (token, head in the group, mask) of a tile's rows: each token once per head."""
    o_m = tl.arange(0, BLOCK_M)
    return first + o_m // GROUP, o_m % GROUP, o_m // GROUP < count


@triton.jit
def _load_slots(slots, o_s, m_m, SIZE: tl.constexpr):
    """Return (last slot a past block may begin at, last slot, first slot in the own block)."""
    b_slot = tl.load(slots + o_s, mask=m_m, other=0)
    b_own = b_slot // SIZE * SIZE
    # A landmark is not visible in its own block.
    return b_own - 1, tl.where(b_slot - b_own == SIZE - 1, b_slot - 1, b_slot), b_own


@triton.jit
def _own_tiles(slots, first, count, SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the first tile of own keys and the one past the last, of rows first ..."""
    own = tl.load(slots + first) // SIZE * SIZE
    return own // BLOCK_N, tl.load(slots + first + count - 1) // BLOCK_N + 1


@triton.jit
def _list_length(p_ids, num_ids, BLOCK_K: tl.constexpr):
    """Return the place after the last entry of a list."""
    o_k = tl.arange(0, BLOCK_K)
    b_id = tl.load(p_ids + o_k, mask=o_k < num_ids, other=-1)
    return tl.max(tl.where(b_id >= 0, o_k + 1, 0))


@triton.jit
def _load_members(p_members, first, num_ids, BLOCKS: tl.constexpr):
    """Return the bits of the rows that read each of BLOCKS entries of a list."""
    o_id = first + tl.arange(0, BLOCKS)
    return tl.load(p_members + o_id, mask=o_id < num_ids, other=0)


@triton.jit
def _chunk_length(sizes, i_head, i_unit, num_units, PARTS: tl.constexpr):
    """Return the length of a chunk's or a half's list; -1 if the other way is less work.

    PARTS: 1 for chunks, 2 for halves. A step of half a tile takes 5/8 of the time of a whole one.
    """
    p_sizes = sizes + (i_head * (num_units // PARTS) + i_unit // PARTS) * 3
    whole, first, second = tl.load(p_sizes), tl.load(p_sizes + 1), tl.load(p_sizes + 2)
    halves = (first + second) * 5 < whole * 8
    if PARTS == 1:
        length = tl.where(halves, -1, whole)
    else:
        length = tl.where(halves, tl.where(i_unit % 2 == 0, first, second), -1)
    return length


@triton.jit
def _length_of(
    p_ids, sizes, i_head, i_unit, num_units, num_ids,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Return the length of a program's list; -1 if it has none, see `_chunk_length`."""
    if CHUNK > 0:
        stop = _chunk_length(sizes, i_head, i_unit, num_units, PARTS)
    else:
        stop = _list_length(p_ids, num_ids, BLOCK_K)
    return stop


@triton.jit
def _load_blocks(
    p_k, p_v, p_ids, i, num_ids, begins, stride_ke, stride_ks, stride_ve, stride_vs,
    SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, WIDTH: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Return keys and values of BLOCKS entries of a list, places in them, and block begins.

    i: number of the group of BLOCKS entries.
    """
    o_n = tl.arange(0, BLOCK_N)
    o_in = o_n % WIDTH
    o_id = i * BLOCKS + tl.arange(0, BLOCKS)
    b_id = tl.load(p_ids + o_id, mask=o_id < num_ids, other=-1)
    b_begin = begin_of(begins, b_id, SIZE, LOCAL)
    o_row = o_in.to(tl.int64)
    if BLOCKS == 1:
        # Only the scalar address of the entry changes. What -1 loads instead is hidden.
        i_e = tl.maximum(tl.load(p_ids + i), 0).to(tl.int64)
        m_row = o_in < SIZE
        ALL: tl.constexpr = SIZE == WIDTH
        b_k = load_rows(p_k + i_e * stride_ke, o_row * stride_ks, m_row, HEAD_DIM, BLOCK_D, ALL)
        b_v = load_rows(p_v + i_e * stride_ve, o_row * stride_vs, m_row, HEAD_DIM, BLOCK_D, ALL)
    else:
        o_id = i * BLOCKS + o_n // WIDTH
        b_e = tl.load(p_ids + o_id, mask=o_id < num_ids, other=-1)
        m_row = (b_e >= 0) & (o_in < SIZE)
        b_e = b_e.to(tl.int64)
        b_k = load_rows(p_k, b_e * stride_ke + o_row * stride_ks, m_row, HEAD_DIM, BLOCK_D)
        b_v = load_rows(p_v, b_e * stride_ve + o_row * stride_vs, m_row, HEAD_DIM, BLOCK_D)
    return b_k, b_v, o_in, b_begin


@triton.jit
def _sparse_fwd_kernel(
    q, k, v, out, lse,
    ids, members, sizes, slots, begins, k_idx, tiles,
    qk_scale, seqlen_q, seqlen_k, num_units, num_ids,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ke, stride_ks, stride_kh,
    stride_vb, stride_ve, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOCAL: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of some rows of one unit.

    tiles: int32 `[n, 3]`: a unit, the first of its rows in the tile, and their number. DESCRIBED: k
    and v are descriptors, a tile of keys is two entries.
    """
    # Late units have the most blocks, so they start first.
    p_tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    first, count = tl.load(p_tile + 1), tl.load(p_tile + 2)
    i_hk = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_head = i_b * tl.num_programs(1) + i_hk
    i_unit = tl.load(p_tile)
    i_list = (i_head * num_units + i_unit) * num_ids
    p_ids, p_members = ids + i_list, members + i_list
    stop = _length_of(p_ids, sizes, i_head, i_unit, num_units, num_ids, BLOCK_K, CHUNK, PARTS)
    if stop < 0:
        return
    o_s, o_g, m_m = _rows_of(first, count, GROUP, BLOCK_M)
    o_h = i_hk * GROUP + o_g
    b_q_last, b_own_last, b_own_lo = _load_slots(slots, o_s, m_m, SIZE)
    o_s = o_s.to(tl.int64)
    p_q = q + i_b * stride_qb
    b_q = load_rows(p_q, o_s * stride_qs + o_h * stride_qh, m_m, HEAD_DIM, BLOCK_D)
    if DESCRIBED:
        b_out, b_max, b_sum = list_fwd(
            b_q, k, v, i_b, i_hk, p_ids, p_members, begins, stop, b_q_last, o_s, qk_scale, SIZE,
            BLOCK_D, BLOCK_M, LOCAL, CHUNK,
        )  # fmt: skip
        if LOCAL:
            lo, hi = _own_tiles(slots, first, count, SIZE, SIZE)
            b_out, b_max, b_sum = own_block_fwd(
                b_q, k, v, b_out, b_max, b_sum, i_b, i_hk, lo, hi, seqlen_k, qk_scale, b_own_last,
                b_own_lo, k_idx, SIZE, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    else:
        p_k = k + i_b * stride_kb + i_hk * stride_kh
        p_v = v + i_b * stride_vb + i_hk * stride_vh
        b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        for i in range(0, (stop + BLOCKS - 1) // BLOCKS):
            if STEPS == 1:
                b_k, b_v, o_in, b_begin = _load_blocks(
                    p_k, p_v, p_ids, i, stop, begins, stride_ke, stride_ks, stride_ve, stride_vs,
                    SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCKS, WIDTH, LOCAL,
                )  # fmt: skip
                m_visible = b_begin[None, :] <= b_q_last[:, None]
                if CHUNK > 0:
                    b_member = _load_members(p_members, i * BLOCKS, stop, BLOCKS)
                    m_visible = m_visible & reads(b_member[None, :], o_s[:, None], CHUNK)
                b_out, b_max, b_sum = past_fwd(
                    b_q, b_k, b_v, b_out, b_max, b_sum, o_in, m_visible, qk_scale, SIZE, BLOCK_M,
                    BLOCK_N, BLOCKS, WIDTH, True,
                )  # fmt: skip
            else:
                i_e = tl.load(p_ids + i)
                m_visible = begin_of(begins, i_e, SIZE, LOCAL) <= b_q_last
                i_e = tl.maximum(i_e, 0).to(tl.int64)
                if CHUNK > 0:
                    m_visible = m_visible & reads(tl.load(p_members + i), o_s, CHUNK)
                b_out, b_max, b_sum = large_fwd(
                    b_q, p_k + i_e * stride_ke, p_v + i_e * stride_ve, b_out, b_max, b_sum,
                    stride_ks, stride_vs, m_visible, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M,
                    BLOCK_N, STEPS, True,
                )  # fmt: skip
        if LOCAL:
            lo, hi = _own_tiles(slots, first, count, SIZE, BLOCK_N)
            for i in range(lo, hi):
                b_out, b_max, b_sum = fwd_step(
                    b_q, b_out, b_max, b_sum, p_k, p_v, i, seqlen_k, stride_ks, stride_vs, qk_scale,
                    b_own_last, b_own_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, True,
                )  # fmt: skip
    b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
    o_row = (i_head * GROUP + o_g) * seqlen_q + o_s
    tl.store(lse + o_row, b_lse, mask=m_m)
    p_out = out + i_b * stride_ob
    store_rows(p_out, b_out, o_s * stride_os + o_h * stride_oh, m_m, HEAD_DIM, BLOCK_D)


@triton.jit
def _sparse_bwd_dq_kernel(
    q, k, v, out, dout, lse, delta, dq,
    ids, members, sizes, slots, begins, k_idx, tiles,
    softmax_scale, seqlen_q, seqlen_k, num_units, num_ids,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ke, stride_ks, stride_kh,
    stride_vb, stride_ve, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    stride_dout_b, stride_dout_s, stride_dout_h, stride_db, stride_ds, stride_dh,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOCAL: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute dq of some rows of one unit, and delta, which the kernel for dk and dv reads."""
    p_tile = tiles + (tl.num_programs(0) - 1 - tl.program_id(0)) * 3
    first, count = tl.load(p_tile + 1), tl.load(p_tile + 2)
    i_hk = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_head = i_b * tl.num_programs(1) + i_hk
    i_unit = tl.load(p_tile)
    i_list = (i_head * num_units + i_unit) * num_ids
    p_ids, p_members = ids + i_list, members + i_list
    stop = _length_of(p_ids, sizes, i_head, i_unit, num_units, num_ids, BLOCK_K, CHUNK, PARTS)
    if stop < 0:
        return
    o_s, o_g, m_m = _rows_of(first, count, GROUP, BLOCK_M)
    o_h = i_hk * GROUP + o_g
    b_q_last, b_own_last, b_own_lo = _load_slots(slots, o_s, m_m, SIZE)
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
    qk_scale = softmax_scale * LOG2E
    if DESCRIBED:
        b_dq = list_dq(
            b_q, b_dout, b_lse, b_delta, k, v, i_b, i_hk, p_ids, p_members, begins, stop, b_q_last,
            o_s, qk_scale, SIZE, BLOCK_D, BLOCK_M, LOCAL, CHUNK,
        )  # fmt: skip
        if LOCAL:
            lo, hi = _own_tiles(slots, first, count, SIZE, SIZE)
            b_dq = own_block_dq(
                b_q, b_dout, b_dq, b_lse, b_delta, k, v, i_b, i_hk, lo, hi, seqlen_k, qk_scale,
                b_own_last, b_own_lo, k_idx, SIZE, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    else:
        p_k = k + i_b * stride_kb + i_hk * stride_kh
        p_v = v + i_b * stride_vb + i_hk * stride_vh
        b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for i in range(0, (stop + BLOCKS - 1) // BLOCKS):
            if STEPS == 1:
                b_k, b_v, o_in, b_begin = _load_blocks(
                    p_k, p_v, p_ids, i, stop, begins, stride_ke, stride_ks, stride_ve, stride_vs,
                    SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, BLOCKS, WIDTH, LOCAL,
                )  # fmt: skip
                m_visible = b_begin[None, :] <= b_q_last[:, None]
                if CHUNK > 0:
                    b_member = _load_members(p_members, i * BLOCKS, stop, BLOCKS)
                    m_visible = m_visible & reads(b_member[None, :], o_s[:, None], CHUNK)
                b_dq = past_dq(
                    b_q, b_dout, b_dq, b_lse, b_delta, b_k, b_v, o_in, m_visible, qk_scale, SIZE,
                    BLOCK_M, BLOCK_N, BLOCKS, WIDTH, True,
                )  # fmt: skip
            else:
                i_e = tl.load(p_ids + i)
                m_visible = begin_of(begins, i_e, SIZE, LOCAL) <= b_q_last
                i_e = tl.maximum(i_e, 0).to(tl.int64)
                if CHUNK > 0:
                    m_visible = m_visible & reads(tl.load(p_members + i), o_s, CHUNK)
                b_dq = large_dq(
                    b_q, b_dout, b_dq, b_lse, b_delta, p_k + i_e * stride_ke, p_v + i_e * stride_ve,
                    stride_ks, stride_vs, m_visible, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M,
                    BLOCK_N, STEPS, True,
                )  # fmt: skip
        if LOCAL:
            lo, hi = _own_tiles(slots, first, count, SIZE, BLOCK_N)
            for i in range(lo, hi):
                b_dq = dq_step(
                    b_q, b_dout, b_dq, b_lse, b_delta, p_k, p_v, i, seqlen_k, stride_ks, stride_vs,
                    qk_scale, b_own_last, b_own_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
                    True, True,
                )  # fmt: skip
    o_dq = i_b * stride_db + o_s * stride_ds + o_h * stride_dh
    store_rows(dq, b_dq * softmax_scale, o_dq, m_m, HEAD_DIM, BLOCK_D)


@triton.jit
def _load_row_tile(
    q, dout, lse, delta, p_tokens, i_b, i_head, i_hk, first, count, seqlen_q,
    stride_qb, stride_qs, stride_qh, stride_dout_b, stride_dout_s, stride_dout_h,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    GATHER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Return (q, dout, lse in base 2, delta, tokens, mask) of up to BLOCK_M // GROUP tokens.

    These are `count` tokens from `first` on; with GATHER, of those that p_tokens names. WIDE:
    the rows of a group lie 2^31 elements or more apart; a gather by int64 is 64 instructions more.
    """
    o_s, o_g, m_m = _rows_of(first, count, GROUP, BLOCK_M)
    # Where the group does not divide the tile, the last rows belong to the next tile.
    if BLOCK_M % GROUP != 0:
        m_m = m_m & (tl.arange(0, BLOCK_M) < BLOCK_M // GROUP * GROUP)
    p_q = q + i_b * stride_qb + i_hk * GROUP * stride_qh
    p_dout = dout + i_b * stride_dout_b + i_hk * GROUP * stride_dout_h
    i_row = i_head * GROUP * seqlen_q
    if GATHER:
        # First the scalar, so that rows of a thread have one address and fixed distances.
        o_s = tl.load(p_tokens + first + tl.arange(0, BLOCK_M) // GROUP, mask=m_m, other=0)
        o_at = o_s
    else:
        # In a loop only these scalars change; the tile's own offsets are loop invariant.
        p_q += first.to(tl.int64) * stride_qs
        p_dout += first.to(tl.int64) * stride_dout_s
        i_row += first
        o_at = tl.arange(0, BLOCK_M) // GROUP
    if WIDE:
        o_g, o_at = o_g.to(tl.int64), o_at.to(tl.int64)
    b_q = load_rows(p_q, o_g * stride_qh + o_at * stride_qs, m_m, HEAD_DIM, BLOCK_D)
    o_dout = o_g * stride_dout_h + o_at * stride_dout_s
    b_dout = load_rows(p_dout, o_dout, m_m, HEAD_DIM, BLOCK_D)
    o_row = o_g * seqlen_q + o_at
    b_lse = tl.load(lse + i_row + o_row, mask=m_m, other=float("inf")) * LOG2E
    b_delta = tl.load(delta + i_row + o_row, mask=m_m, other=0.0)
    return b_q, b_dout, b_lse, b_delta, o_s, m_m


@triton.jit
def _sparse_bwd_dkv_kernel(
    q, k, v, dout, lse, delta, dk, dv,
    readers, reader_starts, units, slots, begins, own_rows,
    softmax_scale, seqlen_q, num_entries, num_units, num_ids, segments, nheads_kv,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ke, stride_ks, stride_kh,
    stride_vb, stride_ve, stride_vs, stride_vh, stride_dout_b, stride_dout_s, stride_dout_h,
    stride_dkb, stride_dke, stride_dks, stride_dkh, stride_dvb, stride_dve, stride_dvs, stride_dvh,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, LOCAL: tl.constexpr, GATHER: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one entry, or of a part of it.

    readers: places in the lists that name an entry, those of entry e from reader_starts[e] on; by
    key head where LOCAL. GATHER: rows that read an entry and their starts, of `union.invert`; K is
    num_ids either way. units, own_rows: int32 `[n, 2]`: the first row, and the number of rows, of
    each unit, and inside each block.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP
    i_e = tl.program_id(0).to(tl.int64) // STEPS
    i_part = tl.program_id(0) % STEPS
    i_hk = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_list = i_b * tl.num_programs(1) + i_hk
    o_in = i_part * BLOCK_N + tl.arange(0, BLOCK_N)
    o_at = o_in.to(tl.int64)
    m_n = o_in < SIZE
    p_k = k + i_b * stride_kb + i_hk * stride_kh + i_e * stride_ke
    p_v = v + i_b * stride_vb + i_hk * stride_vh + i_e * stride_ve
    b_k = load_rows(p_k, o_at * stride_ks, m_n, HEAD_DIM, BLOCK_D)
    b_v = load_rows(p_v, o_at * stride_vs, m_n, HEAD_DIM, BLOCK_D)
    begin = (i_e * SIZE).to(tl.int32) if LOCAL else tl.load(begins + i_e)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2E
    if LOCAL:
        # Rows before the part do not see it.
        skipped = i_part * BLOCK_N
        start = tl.load(own_rows + i_e * 2) + skipped
        length = tl.load(own_rows + i_e * 2 + 1) - skipped
        for i_m in range(0, (length + TOKENS - 1) // TOKENS):
            offset = i_m * TOKENS
            b_q, b_dout, b_lse, b_delta, o_s, m_m = _load_row_tile(
                q, dout, lse, delta, readers, i_b, i_list, i_hk, start + offset, length - offset,
                seqlen_q, stride_qb, stride_qs, stride_qh, stride_dout_b, stride_dout_s,
                stride_dout_h, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, False, WIDE,
            )  # fmt: skip
            _, b_last, _ = _load_slots(slots, o_s, m_m, SIZE)
            m_visible = (begin + o_in)[None, :] <= b_last[:, None]
            b_dk, b_dv = own_dkv(
                b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, m_visible, qk_scale, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
    if GATHER:
        p_starts = reader_starts + (i_list * (num_entries + 1) + i_e) * segments
        p_readers = readers + i_list * seqlen_q * num_ids
        first, last = tl.load(p_starts), tl.load(p_starts + segments)
        steps = 1
    else:
        p_starts = reader_starts + i_list * (num_entries + 1) + i_e
        p_readers = readers + i_list * num_units * num_ids
        first, steps = tl.load(p_starts), tl.load(p_starts + 1) - tl.load(p_starts)
    for i in range(0, steps):
        i_unit = i_list * num_units
        if GATHER:
            start, length = first, last - first
        else:
            i_unit += tl.load(p_readers + first + i) // num_ids
            p_unit = units + (i_unit % num_units) * 2
            start, length = tl.load(p_unit), tl.load(p_unit + 1)
        i_head = i_unit // num_units
        for i_m in range(0, (length + TOKENS - 1) // TOKENS):
            offset = i_m * TOKENS
            b_q, b_dout, b_lse, b_delta, o_s, m_m = _load_row_tile(
                q, dout, lse, delta, p_readers, i_head // nheads_kv, i_head, i_head % nheads_kv,
                start + offset, length - offset, seqlen_q,
                stride_qb, stride_qs, stride_qh, stride_dout_b, stride_dout_s, stride_dout_h,
                GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, GATHER, WIDE,
            )  # fmt: skip
            # Entries begin at multiples of SIZE: one is past if it ends before the row's slot.
            m_visible = begin + SIZE <= tl.load(slots + o_s, mask=m_m, other=0)
            if STEPS == 1:
                b_dk, b_dv = past_dkv(
                    b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, o_in, m_visible[:, None],
                    qk_scale, SIZE, BLOCK_M, BLOCK_N, BLOCKS, WIDTH, True,
                )  # fmt: skip
            else:
                b_dk, b_dv = large_dkv(
                    b_q, b_dout, b_dk, b_dv, b_lse, b_delta, b_k, b_v, o_in, p_k, p_v, stride_ks,
                    stride_vs, m_visible, qk_scale, SIZE, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
                    STEPS, True,
                )  # fmt: skip
    p_dk = dk + i_b * stride_dkb + i_hk * stride_dkh + i_e * stride_dke
    p_dv = dv + i_b * stride_dvb + i_hk * stride_dvh + i_e * stride_dve
    store_rows(p_dk, b_dk * softmax_scale, o_at * stride_dks, m_n, HEAD_DIM, BLOCK_D)
    store_rows(p_dv, b_dv, o_at * stride_dvs, m_n, HEAD_DIM, BLOCK_D)

"""Costs of past blocks for selection units, and the least of them: `top_k` for the definition.

Shapes: q `[b, s, h, d]`; k `[b, n, h_kv, d]`, landmarks; costs `[b, h_kv, units, n]`, the bits of
fp32 numbers; ids int32 `[b, h_kv, units, K]`; slots, lo, unit_of int32 `[s]`: slot, first slot of
the document, and unit of each row.

    grid (tiles of rows, h_kv, b); a tile is TOKENS consecutive tokens times the heads of a group

        pass 1   landmarks 0 ......... last past one     lse of each row, online
        pass 2   the same again                          1 - ln p, least of the tile's rows

The minimum over the tiles of a unit is atomic. Unlike a sum it depends on no order, so the same
inputs give the same bits. A row's cost depends on neither its place in a tile nor its shard: tiles
of landmarks count from block 0 of the grid, and a hidden landmark changes nothing.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false

import triton
import triton.language as tl

from lcdist_kernels.triton_common import LN2, LOWEST, dot, load_rows

INFINITE = tl.constexpr(0x7F800000)  # the bits of inf


@triton.jit
def _landmark_scores(
    b_q, p_k, i_n, b_first, b_stop, num_blocks, stride_kn, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return the scores of tile i_n of landmarks (base 2), -inf where hidden, and their numbers."""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_k = load_rows(p_k, o_n.to(tl.int64) * stride_kn, o_n < num_blocks, HEAD_DIM, BLOCK_D)
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * qk_scale
    m_past = (o_n[None, :] >= b_first[:, None]) & (o_n[None, :] < b_stop[:, None])
    return tl.where(m_past, b_s, float("-inf")), o_n


@triton.jit
def _top_k_costs_kernel(
    q, k, costs, slots, lo, unit_of,
    qk_scale, first_row, stop_row, first_unit, num_units, num_blocks,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
    GROUP: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Lower the costs of units first_unit .. by those of a tile of rows first_row .. stop_row.

    HEADS: GROUP rounded up to a power of two.
    """
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    # Late rows have the most blocks, so they start first.
    start = first_row + (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS
    i_hk = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_s, o_g = start + o_m // HEADS, o_m % HEADS
    m_m = (o_s < stop_row) & (o_g < GROUP)
    o_q = i_b * stride_qb + o_s.to(tl.int64) * stride_qs + (i_hk * GROUP + o_g) * stride_qh
    b_q = load_rows(q, o_q, m_m, HEAD_DIM, BLOCK_D)
    b_stop = tl.load(slots + o_s, mask=m_m, other=0) // SIZE
    b_first = tl.load(lo + o_s, mask=m_m, other=2147483647) // SIZE
    i_first, i_stop = tl.min(b_first) // BLOCK_N, (tl.max(b_stop) + BLOCK_N - 1) // BLOCK_N
    p_k = k + i_b * stride_kb + i_hk * stride_kh

    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for i_n in range(i_first, i_stop):
        b_s, _ = _landmark_scores(
            b_q, p_k, i_n, b_first, b_stop, num_blocks, stride_kn, qk_scale, HEAD_DIM, BLOCK_D,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[:, None]), 1)
        b_max = b_new
    # A row without past blocks has scores of -inf only: its costs are infinite with any lse.
    b_lse = b_max + tl.log2(tl.maximum(b_sum, 1.0))

    p_costs = costs + (i_b * tl.num_programs(1) + i_hk) * num_units * num_blocks
    o_t = start + tl.arange(0, TOKENS)
    b_unit = tl.load(unit_of + o_t, mask=o_t < stop_row, other=-1)
    last_unit = tl.max(b_unit)
    b_unit = tl.where(b_unit < 0, last_unit, b_unit)
    for i_n in range(i_first, i_stop):
        b_s, o_n = _landmark_scores(
            b_q, p_k, i_n, b_first, b_stop, num_blocks, stride_kn, qk_scale, HEAD_DIM, BLOCK_D,
            BLOCK_M, BLOCK_N,
        )  # fmt: skip
        # -inf becomes inf. Positive numbers sort like their bits.
        b_cost = 1.0 - (b_s - b_lse[:, None]) * LN2
        m_n = o_n < num_blocks
        if tl.min(b_unit) == last_unit:
            b_bits = tl.min(b_cost, 0).to(tl.int32, bitcast=True)
            p_unit = p_costs + (last_unit - first_unit).to(tl.int64) * num_blocks
            tl.atomic_min(p_unit + o_n, b_bits, mask=m_n, sem="relaxed")
        else:
            b_least = tl.min(tl.reshape(b_cost, [TOKENS, HEADS, BLOCK_N]), 1)
            p_units = p_costs + (b_unit - first_unit).to(tl.int64) * num_blocks
            p_units = p_units[:, None] + o_n[None, :]
            b_least = b_least.to(tl.int32, bitcast=True)
            tl.atomic_min(p_units, b_least, mask=m_n[None, :], sem="relaxed")


@triton.jit
def _least_kernel(
    costs, ids,
    num_rows, num_blocks, num_ids,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Fill lists ids `[rows, K]` with the blocks of least finite cost, increasing, then -1.

    costs: bits of positive fp32 numbers, int32 `[rows, n]`; they sort like the numbers. Of equal
    costs the first block wins. The greatest cost in the list is found bit by bit.
    """
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_n = tl.arange(0, BLOCK_N)
    m_r = o_r < num_rows
    m = m_r[:, None] & (o_n < num_blocks)[None, :]
    b_cost = tl.load(costs + o_r[:, None] * num_blocks + o_n[None, :], mask=m, other=INFINITE)
    b_limit = tl.zeros([BLOCK_R], tl.int32)
    # The greatest number with fewer than K costs below it, of 31 bits.
    for i in range(0, 31):
        b_higher = b_limit + (tl.full([BLOCK_R], 1, tl.int32) << (30 - i))
        b_count = tl.sum((b_cost < b_higher[:, None]).to(tl.int32), 1)
        b_limit = tl.where(b_count < num_ids, b_higher, b_limit)
    b_below = b_cost < tl.minimum(b_limit, INFINITE)[:, None]
    b_equal = ((b_cost == b_limit[:, None]) & (b_cost < INFINITE)).to(tl.int32)
    b_room = num_ids - tl.sum(b_below.to(tl.int32), 1)
    m_in = b_below | ((b_equal != 0) & (tl.cumsum(b_equal, 1) <= b_room[:, None]))
    b_in = m_in.to(tl.int32)
    p_ids = ids + o_r[:, None] * num_ids
    b_number = tl.broadcast_to(o_n[None, :], [BLOCK_R, BLOCK_N])
    tl.store(p_ids + tl.cumsum(b_in, 1) - 1, b_number, mask=m & m_in)
    o_k = tl.arange(0, BLOCK_K)
    m_none = (o_k[None, :] >= tl.sum(b_in, 1)[:, None]) & (o_k < num_ids)[None, :]
    tl.store(
        p_ids + o_k[None, :], tl.full([BLOCK_R, BLOCK_K], -1, tl.int32), mask=m_none & m_r[:, None]
    )

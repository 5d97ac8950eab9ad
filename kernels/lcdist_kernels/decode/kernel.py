"""Kernels of single queries over a cache.

One query a row leaves a GPU idle if a program takes all its keys. So the keys of a row are split
over programs, each of which writes a partial, and a second kernel merges them (flash decoding). The
query heads that share a value head are packed as rows of one tile, so a key is loaded once.

Shapes: q `[r, h, d]`; k `[rows, capacity, h_k, d]` and u `[rows, capacity, h_u, d]` by strides,
with h_k <= h_u <= h; spans int32 `[r, 3]`: row of the cache, first entry, number of entries; a row
reads every `step`-th entry. part_out fp32 `[r, splits, h, d]`, part_lse fp32 `[r, splits, h]`.
table `[m, 2, L, d]`: blocks of keys and values; ids int32 `[r, h_kv, K]`, -1 for none.

    split       grid (splits, h_u, r)     one part of a row's entries, or of its listed blocks
    merge       grid (h, r)               all parts of a row's head
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from lcdist_kernels.softmax_steps import finish_softmax
from lcdist_kernels.triton_common import LN2, LOG2E, LOWEST, dot, load_rows, store_rows


@triton.jit
def _load_queries(
    q, i_r, i_u, nheads,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the queries of a value head `[BLOCK_G, BLOCK_D]`, their heads, and which there are."""
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < GROUP
    o_h = i_u * GROUP + o_g
    b_q = load_rows(q, (i_r * nheads + o_h) * HEAD_DIM, m_g, HEAD_DIM, BLOCK_D)
    return b_q, o_h, m_g


@triton.jit
def _scores(b_q, b_k, scale):
    """Return the scores of a tile of keys, base 2."""
    return dot(b_q, tl.trans(b_k), tl.zeros([b_q.shape[0], b_k.shape[0]], tl.float32)) * scale


@triton.jit
def _softmax_step(b_s, b_v, b_out, b_max, b_sum, m_n):
    """Return (out, max, sum) after one more tile of scores, of which m_n count."""
    b_s = tl.where(m_n[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_decay = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_decay + tl.sum(b_p, 1)
    b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_decay[:, None])
    return b_out, b_new, b_sum


@triton.jit
def _store_part(
    part_out, part_lse, b_out, b_lse, i_r, i_split, splits, o_h, m_g, nheads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store the partial of one split."""
    o_row = (i_r * splits + i_split) * nheads + o_h
    store_rows(part_out, b_out, o_row * HEAD_DIM, m_g, HEAD_DIM, BLOCK_D)
    tl.store(part_lse + o_row, b_lse, mask=m_g)


@triton.jit
def _split_kernel(
    q, k, u, spans, part_out, part_lse,
    scale, step, per_split, nheads, heads_per_key,
    stride_kr, stride_kn, stride_kh, stride_ur, stride_un, stride_uh,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the partial of one split of a row's entries. scale: base 2."""
    i_split = tl.program_id(0)
    i_u, i_r = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.load(spans + i_r * 3).to(tl.int64)
    first, count = tl.load(spans + i_r * 3 + 1), tl.load(spans + i_r * 3 + 2)
    b_q, o_h, m_g = _load_queries(q, i_r, i_u, nheads, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D)
    p_k = k + row * stride_kr + (i_u // heads_per_key) * stride_kh
    p_u = u + row * stride_ur + i_u * stride_uh
    b_out = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_G], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_G], tl.float32)
    start = i_split * per_split
    for i in range(start, tl.minimum(start + per_split, count), BLOCK_N):
        o_n = i + tl.arange(0, BLOCK_N)
        m_n = o_n < count
        o_entry = first + o_n.to(tl.int64) * step
        b_k = load_rows(p_k, o_entry * stride_kn, m_n, HEAD_DIM, BLOCK_D)
        b_v = load_rows(p_u, o_entry * stride_un, m_n, HEAD_DIM, BLOCK_D)
        b_s = _scores(b_q, b_k, scale)
        b_out, b_max, b_sum = _softmax_step(b_s, b_v, b_out, b_max, b_sum, m_n)
    b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
    _store_part(
        part_out, part_lse, b_out, b_lse, i_r, i_split, tl.num_programs(0), o_h, m_g, nheads,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _blocks_kernel(
    q, table, ids, part_out, part_lse,
    scale, per_split, nheads, num_ids,
    SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the partial of one split of a row's listed blocks; SIZE: tokens of a block.

    A block is one entry of the gate's softmax: its weight is that of its landmark, the last token,
    and its value is the softmax of the others over their values.
    """
    i_split = tl.program_id(0)
    i_u, i_r = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b_q, o_h, m_g = _load_queries(q, i_r, i_u, nheads, GROUP, BLOCK_G, HEAD_DIM, BLOCK_D)
    p_ids = ids + (i_r * tl.num_programs(1) + i_u) * num_ids
    b_out = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_G], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_G], tl.float32)
    start = i_split * per_split
    for i in range(start, tl.minimum(start + per_split, num_ids)):
        number = tl.load(p_ids + i).to(tl.int64)
        if number >= 0:
            p_k = table + number * (2 * SIZE * HEAD_DIM)
            p_v = p_k + SIZE * HEAD_DIM
            b_in = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            b_top = tl.full([BLOCK_G], LOWEST, tl.float32)
            b_total = tl.zeros([BLOCK_G], tl.float32)
            b_gate = tl.zeros([BLOCK_G], tl.float32)
            for j in range(0, SIZE, BLOCK_N):
                o_n = j + tl.arange(0, BLOCK_N)
                m_n = o_n < SIZE
                o_at = o_n.to(tl.int64) * HEAD_DIM
                b_k = load_rows(p_k, o_at, m_n, HEAD_DIM, BLOCK_D)
                b_v = load_rows(p_v, o_at, m_n, HEAD_DIM, BLOCK_D)
                b_s = _scores(b_q, b_k, scale)
                b_gate += tl.sum(tl.where((o_n == SIZE - 1)[None, :], b_s, 0.0), 1)
                b_in, b_top, b_total = _softmax_step(
                    b_s, b_v, b_in, b_top, b_total, o_n < SIZE - 1
                )  # fmt: skip
            b_new = tl.maximum(b_max, b_gate)
            b_weight, b_decay = tl.exp2(b_gate - b_new), tl.exp2(b_max - b_new)
            b_sum = b_sum * b_decay + b_weight
            b_out = b_out * b_decay[:, None] + b_in * (b_weight / b_total)[:, None]
            b_max = b_new
    b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
    _store_part(
        part_out, part_lse, b_out, b_lse, i_r, i_split, tl.num_programs(0), o_h, m_g, nheads,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _merge_kernel(
    part_out, part_lse, out, lse, splits,
    BLOCK_S: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the partial over all splits of one head of a row."""
    i_h, i_r = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    nheads = tl.num_programs(0)
    o_s = tl.arange(0, BLOCK_S)
    m_s = o_s < splits
    o_row = (i_r * splits + o_s) * nheads + i_h
    b_lse = tl.load(part_lse + o_row, mask=m_s, other=float("-inf")) * LOG2E
    b_max = tl.max(b_lse, 0)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_weight = tl.exp2(b_lse - b_max)
    b_total = tl.sum(b_weight, 0)
    b_part = load_rows(part_out, o_row * HEAD_DIM, m_s, HEAD_DIM, BLOCK_D)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(b_total == 0, 1.0, b_total)
    b_whole = tl.where(b_total == 0, float("-inf"), (b_max + tl.log2(b_total)) * LN2)
    o_one = tl.arange(0, 1)
    o_at = (i_r * nheads + i_h + o_one) * HEAD_DIM
    store_rows(out, b_out[None, :], o_at, o_one == 0, HEAD_DIM, BLOCK_D)
    tl.store(lse + i_r * nheads + i_h, b_whole)

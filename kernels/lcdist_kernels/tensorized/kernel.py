"""Tensorized attention in Triton: a branch and the hop of a mode in one sweep over its fibres.

The branches and hops are defined in `tensorized.tiled`. Fibre (o, r) of mode j is the tokens (o n_j
+ i) s_j + r: strided rows of the tensors, so nothing is transposed or copied.

Shapes: q, out, u_next `[b, s, h, d]`; k `[b, s, h_k, d]`; u `[b, s, h_u, d]`; lse, hop_lse `[b, h,
s]`; q_idx, q_lo, k_idx: limits of a branch within a fibre; ranges int32 `[tiles, 4]`. Sizes:
size_q, size_k tokens of a fibre (n_j); stride s_j; outers: fibres o per sequence.

    sequence  | 0 1 2 3 | 4 5 6 7 | 8 9 ..          mode j with s_j = 4: fibre r = 1 is 1, 5, 9, ..

    one fibre:                keys
                     +-----+-----+-----+-----+      fwd: a program is a row of tiles of one fibre
        queries      |  f  |  h  |  h  |  h  |      and head; the grid is one-dimensional: heads run
                     +-----+-----+-----+-----+      fastest, then offsets r, tiles, fibres o, batch
                     |  =  |  f  |  h  |  h  |
                     +-----+-----+-----+-----+      =  branch and hop see all: one accumulator
                     |  =  |  =  |  f  |  h  |      f  the accumulators fork: branch masked, hop not
                     +-----+-----+-----+-----+      h  only the hop goes on

A tile of a short fibre's queries has rows of HEADS query heads that share keys and U, head after
head, so that products have as many rows as elsewhere and a tile of keys is loaded once for all.

Branch and hop share a sweep where they have the same queries. Alone, each walks its tiles like full
attention, by descriptors where tensors have them. A branch's epilogue merges its
partial with that of the branches before it, kept in q's dtype with lse in fp32. Nothing is added
atomically. Scores are scaled by log2 e, exponentials are base 2. What launches allocate is
contiguous and has no strides among the arguments.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl

from lcdist_kernels.rotary_kernel import cosines
from lcdist_kernels.softmax_steps import (
    finish_softmax,
    fwd_loop,
    fwd_step,
    load_limits,
    load_range,
    merge_partials,
    nth_masked,
)
from lcdist_kernels.triton_common import (
    LOG2E,
    LOWEST,
    load_rows,
    load_tile,
    store_rows,
    store_tile,
)


@triton.jit
def program_coords(tiles, stride, nheads):
    """Return (tile, head, offset r, fibre number with the batch row) of a program.

    Heads run fastest, then offsets: neighbouring programs read neighbouring rows.
    """
    i = tl.program_id(0)
    i_h = i % nheads
    i = i // nheads
    i_r = i % stride
    i = i // stride
    return i % tiles, i_h.to(tl.int64), i_r.to(tl.int64), (i // tiles).to(tl.int64)


@triton.jit
def tile_rows(i_m, HEADS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return (first place in the fibre, place of each row, its head among HEADS) of a tile."""
    FIBRE: tl.constexpr = BLOCK_M // HEADS
    start = i_m * FIBRE
    o_m = tl.arange(0, BLOCK_M)
    if HEADS == 1:
        o_f, o_g = start + o_m, 0
    else:
        o_f, o_g = start + o_m % FIBRE, o_m // FIBRE
    return start, o_f, o_g


@triton.jit
def load_queries_of(
    p, start, o_f, o_g, size, step, stride_h,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return the rows of `tile_rows` of a tensor, 0 past the fibre's end.

    p: the fibre's first row in the first head. step, stride_h: between places and between heads.
    """
    if HEADS == 1:
        b = load_tile(p, start, size, step, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    else:
        o_at = o_f.to(tl.int64) * step + o_g.to(tl.int64) * stride_h
        b = load_rows(p, o_at, o_f < size, HEAD_DIM, BLOCK_D)
    return b


@triton.jit
def store_queries_of(
    p, b, start, o_f, o_g, size, step, stride_h,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store the rows of `tile_rows`; arguments as of `load_queries_of`."""
    if HEADS == 1:
        store_tile(p, b, start, size, step, BLOCK_M, HEAD_DIM, BLOCK_D)
    else:
        o_at = o_f.to(tl.int64) * step + o_g.to(tl.int64) * stride_h
        store_rows(p, b, o_at, o_f < size, HEAD_DIM, BLOCK_D)


@triton.jit
def _fwd_all(
    b_q, b_out, b_max, b_sum, p_k, p_u, lo, size_k, step_k, step_u, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) after all key tiles from `lo` on, visible to all queries."""
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    whole = tl.maximum(size_k // BLOCK_N, lo)
    for i in range(0, whole - lo):
        b_out, b_max, b_sum = fwd_step(
            b_q, b_out, b_max, b_sum, p_k, p_u, lo + i, size_k, step_k, step_u, qk_scale, b_all,
            b_all, None, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False,
        )  # fmt: skip
    for i in range(0, tl.cdiv(size_k, BLOCK_N) - whole):
        b_out, b_max, b_sum = fwd_step(
            b_q, b_out, b_max, b_sum, p_k, p_u, whole + i, size_k, step_k, step_u, qk_scale, b_all,
            b_all, None, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, True,
        )  # fmt: skip
    return b_out, b_max, b_sum


@triton.jit
def _fork(
    b_q, p_k, p_u, lo, full_lo, full_hi, hi, before, i_o, size_k, step_k, step_u, qk_scale, b_q_idx,
    b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) of the branch, and those of the hop after the branch's tiles."""
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
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
        # The same tile and scores: the compiler computes common parts once.
        hop_out, hop_max, hop_sum = fwd_step(
            b_q, hop_out, hop_max, hop_sum, p_k, p_u, i_n, size_k, step_k, step_u, qk_scale, b_all,
            b_all, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, True,
        )  # fmt: skip
    if before is not None:
        # The blocks just before this one are one run of rows, all in the past.
        rows_before = tl.load(before + i_o) * size_k
        b_out, b_max, b_sum = _fwd_all(
            b_q, b_out, b_max, b_sum, p_k - rows_before * step_k, p_u - rows_before * step_u, 0,
            rows_before, step_k, step_u, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return (b_out, b_max, b_sum), (hop_out, hop_max, hop_sum)


@triton.jit
def head_rows(x, i_b, i_h, row, seqlen, nheads, HEAD_DIM: tl.constexpr):
    """Return a pointer to a row of one head of a contiguous tensor `[b, s, h, d]`."""
    return x + ((i_b * seqlen + row) * nheads + i_h) * HEAD_DIM


@triton.jit
def rotate_tile(
    b, angles, turns, factor, i_b, stride_ab, row, o_s, size, stride, sign,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return a tile of tokens of a fibre, rotated in fp32; sign = -1: the adjoint.

    angles: what to rotate each token of a sequence by, `[s]` or `[b, s]`, in steps of `turns` (see
    `rotary_kernel`); None: nothing is rotated. row, o_s, size, stride: the fibre's first token, the
    rows' places in it, its tokens, and what lies between them.
    """
    if angles is not None:
        o_f = tl.arange(0, BLOCK_D // 2)
        p_at = angles + i_b * stride_ab + row + o_s.to(tl.int64) * stride
        b_p = tl.load(p_at, mask=o_s < size, other=0)
        b_cos, b_sin = cosines(b_p, tl.load(turns + o_f, mask=o_f < HEAD_DIM // 2, other=0))
        b_cos, b_sin = b_cos * factor, b_sin * (factor * sign)
        b_pairs = tl.permute(tl.reshape(b.to(tl.float32), [BLOCK_S, 2, BLOCK_D // 2]), [0, 2, 1])
        b_one, b_two = tl.split(b_pairs)
        b_pairs = tl.join(b_one * b_cos - b_two * b_sin, b_two * b_cos + b_one * b_sin)
        b = tl.reshape(tl.permute(b_pairs, [0, 2, 1]), [BLOCK_S, BLOCK_D])
    return b


@triton.jit
def load_queries(
    p_q, start, o_f, o_g, size_q, step_q, stride_qh, angles, turns, factor, i_b, stride_ab, row,
    stride,
    MEAN: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return a tile of queries: the mean over MEAN heads, rotated; rounded once.

    start, o_f, o_g: of `tile_rows`. Either MEAN or HEADS is 1.
    """
    b_q = load_queries_of(
        p_q, start, o_f, o_g, size_q, step_q, stride_qh, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    if MEAN > 1:
        b_sum = b_q.to(tl.float32)
        for i in range(1, MEAN):
            p_one = p_q + i * stride_qh
            b_one = load_tile(p_one, start, size_q, step_q, BLOCK_M, HEAD_DIM, BLOCK_D, False)
            b_sum += b_one.to(tl.float32)
        b_mean = b_sum / MEAN
    else:
        b_mean = b_q
    b_mean = rotate_tile(
        b_mean, angles, turns, factor, i_b, stride_ab, row, o_f, size_q, stride, 1, HEAD_DIM,
        BLOCK_D, BLOCK_M,
    )  # fmt: skip
    return b_mean.to(b_q.dtype)


@triton.jit
def fibre_sources(
    x, y, i_b, i_x, i_y, row, stride, stride_xb, stride_xs, stride_xh, stride_yb, stride_ys,
    stride_yh,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (x, y, at): where a loop reads the tokens of a fibre of two tensors.

    Like `softmax_steps.loop_sources`. row: the fibre's first token. i_x, i_y: heads, which are one
    by descriptors.
    """
    if DESCRIBED:
        at = (
            i_b.to(tl.int32), (row // stride).to(tl.int32), (row % stride).to(tl.int32),
            i_x.to(tl.int32),
        )  # fmt: skip
    else:
        x = x + i_b * stride_xb + i_x * stride_xh + row * stride_xs
        y = y + i_b * stride_yb + i_y * stride_yh + row * stride_ys
        at = (0, 0, 0, 0)
    return x, y, at


@triton.jit
def _tensorized_fwd_kernel(
    q, k, u, prev_out, prev_lse, out, lse, u_next, hop_lse, bias, angles, turns,
    q_idx, q_lo, k_idx, ranges, before,
    factor, stride_ab, qk_scale, size_q, size_k, stride, outers, nheads, seqlen,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_ub, stride_us, stride_uh,
    GROUP_K: tl.constexpr, GROUP_U: tl.constexpr, MEAN: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr,
    BRANCH: tl.constexpr, HOP: tl.constexpr, HEADS: tl.constexpr, DESCRIBED: tl.constexpr,
    EVEN_N: tl.constexpr,
):  # fmt: skip
    """Compute a branch (out, lse) and a hop (u_next, hop_lse) of a tile of a fibre's queries.

    prev_out, prev_lse: the partial of other branches, to be merged with, or None. bias: one per
    head of this branch, or None for 0. before: before[o] whole blocks in front of its own are
    visible to block o's branch; None: no blocks. hop_lse is in base 2. MEAN: query heads whose mean
    is the query, of a hop alone. HEADS: of a tile, more than 1 for a branch alone. angles, turns,
    factor: of the rotation of q, see `rotate_tile`; k is rotated already. DESCRIBED: k and u are
    descriptors, of a branch or a hop alone. EVEN_N: BLOCK_N divides size_k.
    """
    tiles = tl.cdiv(size_q, BLOCK_M // HEADS)
    i_m, i_h, i_r, i_o = program_coords(tiles, stride, nheads // HEADS)
    i_h *= HEADS
    # Late queries have the most keys of a branch, so they start first.
    i_m = tiles - 1 - i_m
    i_b, i_o = i_o // outers, i_o % outers
    # Tokens of the fibre: row + i * stride.
    row_q = i_o * size_q * stride + i_r
    row_k = i_o * size_k * stride + i_r
    i_row = (i_b * nheads + i_h) * seqlen + row_q
    p_q = q + i_b * stride_qb + i_h * MEAN * stride_qh + row_q * stride_qs
    k, u, at = fibre_sources(
        k, u, i_b, i_h // GROUP_K, i_h // GROUP_U, row_k, stride, stride_kb, stride_ks, stride_kh,
        stride_ub, stride_us, stride_uh, DESCRIBED,
    )  # fmt: skip
    stride64 = tl.cast(stride, tl.int64)
    step_q, step_k, step_u = stride_qs * stride64, stride_ks * stride64, stride_us * stride64
    step_own = nheads * HEAD_DIM * stride64

    start, o_m, o_g = tile_rows(i_m, HEADS, BLOCK_M)
    m_m = o_m < size_q
    o_row = i_row + o_m.to(tl.int64) * stride
    if HEADS > 1:
        o_row += tl.cast(o_g, tl.int64) * seqlen
    b_q = load_queries(
        p_q, start, o_m, o_g, size_q, step_q, stride_qh, angles, turns, factor, i_b, stride_ab,
        row_q, stride, MEAN, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    # A hop sees every key; rows past the end are not stored.
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    if BRANCH:
        b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, HAS_LO)
        lo, full_lo, full_hi, hi = load_range(ranges, i_m)
    else:
        b_q_idx, b_q_lo = (None, None) if EVEN_N and DESCRIBED else (b_all, b_all)
        lo, full_lo, full_hi, hi = 0, 0, size_k // BLOCK_N, tl.cdiv(size_k, BLOCK_N)
    if BRANCH and HOP:
        branch, hop = _fork(
            b_q, k, u, lo, full_lo, full_hi, hi, before, i_o, size_k, step_k, step_u, qk_scale,
            b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
        )  # fmt: skip
        b_out, b_max, b_sum = branch
    else:
        b_out, b_max, b_sum = fwd_loop(
            b_q, k, u, at, lo, full_lo, full_hi, hi, size_k, step_k, step_u, qk_scale, b_q_idx,
            b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, DESCRIBED,
        )  # fmt: skip
    if BRANCH:
        b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
        if bias is not None:
            b_lse += tl.load(bias + i_h + o_g)
        if prev_out is not None:
            b_prev_lse = tl.load(prev_lse + o_row, mask=m_m, other=0.0)
            p_prev = head_rows(prev_out, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
            b_prev_out = load_queries_of(
                p_prev, start, o_m, o_g, size_q, step_own, HEAD_DIM, HEADS, HEAD_DIM, BLOCK_D,
                BLOCK_M,
            )  # fmt: skip
            b_out, b_lse = merge_partials(b_out, b_lse, b_prev_out.to(tl.float32), b_prev_lse)
        p_out = head_rows(out, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
        store_queries_of(
            p_out, b_out, start, o_m, o_g, size_q, step_own, HEAD_DIM, HEADS, HEAD_DIM, BLOCK_D,
            BLOCK_M,
        )  # fmt: skip
        tl.store(lse + o_row, b_lse, mask=m_m)
    if BRANCH and HOP:
        b_out, b_max, b_sum = _fwd_all(
            b_q, hop[0], hop[1], hop[2], k, u, tl.maximum(hi, full_hi), size_k, step_k, step_u,
            qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    if HOP:
        b_out, b_hop_lse = finish_softmax(b_out, b_max, b_sum)
        p_u_next = head_rows(u_next, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
        store_tile(p_u_next, b_out, start, size_q, step_own, BLOCK_M, HEAD_DIM, BLOCK_D)
        tl.store(hop_lse + o_row, b_hop_lse * LOG2E, mask=m_m)


@triton.jit
def _row_dot_kernel(
    a, b, total,
    seqlen,
    stride_ab, stride_as, stride_ah, stride_bb, stride_bs, stride_bh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Compute total[b, h, s] = a . b of every row, in fp32."""
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

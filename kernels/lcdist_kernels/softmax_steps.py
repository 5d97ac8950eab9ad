"""One tile of softmax attention: steps, loads and epilogue shared by several kernels.

The formulas are in `full.kernel`; the tables of a band come from `tile_ranges`. Names: b_* is a
tile in registers, p_* a pointer, m_* a mask, o_* an offset, i_* a program or tile number.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from lcdist_kernels.triton_common import (
    LEAST_SCALE,
    LN2,
    LOG2E,
    LOWEST,
    dot,
    load_box,
    load_tile,
)


@triton.jit
def is_visible(q_idx, q_lo, k_idx, HAS_LO: tl.constexpr):
    """Return whether queries see keys; q_idx, q_lo, k_idx broadcast."""
    m = k_idx <= q_idx
    if HAS_LO:
        m = m & (k_idx >= q_lo)
    return m


@triton.jit
def load_range(ranges, i):
    """Return (lo, full_lo, full_hi, hi) of row i of a table of `tile_ranges`."""
    p = ranges + i * 4
    return tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3)


@triton.jit
def nth_masked(i, lo, full_lo, full_hi):
    """Return the i-th tile that needs a mask: those before full_lo, then those from full_hi."""
    before = full_lo - lo
    return tl.where(i < before, lo + i, full_hi + i - before)


@triton.jit
def part_of(lo, full_lo, full_hi, hi, PART: tl.constexpr):
    """Return (first, stop) of the tiles before (0), of (1) and after (2) those without a mask."""
    first, stop = lo, full_lo
    if PART == 1:
        first, stop = full_lo, full_hi
    if PART == 2:
        first, stop = full_hi, hi
    return first, stop


@triton.jit
def finish_softmax(b_out, b_max, b_sum):
    """Return (out, lse) of rows that have met all keys; 0 and -inf for a row that saw none.

    b_out: unnormalised sums of values; b_max: the greatest score, base 2; b_sum: sum of weights.
    """
    m_empty = b_sum == 0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_lse = tl.where(m_empty, float("-inf"), (b_max + tl.log2(b_sum)) * LN2)
    return b_out / b_sum[:, None], b_lse


@triton.jit
def merge_partials(b_out, b_lse, b_prev_out, b_prev_lse):
    """Return the partial over the keys of both; a row that saw nothing in either stays empty.

    The kernel's counterpart of `partial.merge`; lse in natural logarithms.
    """
    b_max = tl.maximum(b_prev_lse, b_lse)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_weight = tl.exp2((b_lse - b_max) * LOG2E)
    b_prev_weight = tl.exp2((b_prev_lse - b_max) * LOG2E)
    b_sum = b_weight + b_prev_weight
    m_empty = b_sum == 0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_out = b_out * (b_weight / b_sum)[:, None] + b_prev_out * (b_prev_weight / b_sum)[:, None]
    return b_out, tl.where(m_empty, float("-inf"), b_max + tl.log2(b_sum) * LN2)


@triton.jit
def query_program(seqlen_q):
    """Return (tile, head, batch row, first row of the statistics) of a kernel that owns queries.

    The grid is (tiles, heads, batch). Late queries have the most keys, so they start first.
    Statistics such as lse are `[b, h, s_q]`.
    """
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    return i_m, i_h, i_b, (i_b * tl.num_programs(1) + i_h) * seqlen_q


@triton.jit
def key_program(k, v, stride_kb, stride_kh, stride_vb, stride_vh):
    """Return (key head, batch row, k, v pointers) of a kernel that owns keys.

    The grid is (tiles, key heads, batch).
    """
    i_hk = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    p_k = k + i_b * stride_kb + i_hk * stride_kh
    return i_hk, i_b, p_k, v + i_b * stride_vb + i_hk * stride_vh


@triton.jit
def head_pointers(
    q, k, v, i_b, i_h, i_hk, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh,
):  # fmt: skip
    """Return pointers to the first elements of query head i_h and of key head i_hk in k and v."""
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_k = k + i_b * stride_kb + i_hk * stride_kh
    return p_q, p_k, v + i_b * stride_vb + i_hk * stride_vh


@triton.jit
def loop_sources(
    x, y, i_b, i_h, first, step, stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (x, y, at): where a loop reads the rows of one head of two tensors.

    The rows are every `step`-th token from `first` on. DESCRIBED: x and y are descriptors, read by
    `load_box`; else the results are pointers to the first row, for `load_tile`.
    """
    if DESCRIBED:
        at = (
            i_b.to(tl.int32), tl.cast(first // step, tl.int32), tl.cast(first % step, tl.int32),
            i_h.to(tl.int32),
        )  # fmt: skip
    else:
        x = x + i_b * stride_xb + i_h * stride_xh + first * stride_xs
        y = y + i_b * stride_yb + i_h * stride_yh + first * stride_ys
        at = (0, 0, 0, 0)
    return x, y, at


@triton.jit
def load_limits(q_idx, q_lo, o_m, m_m, HAS_LO: tl.constexpr):
    """Return the last and the first key number that queries o_m see; rows beyond m_m see none.

    Without HAS_LO no first key hides anything: the second result is then never read.
    """
    b_q_idx = tl.load(q_idx + o_m, mask=m_m, other=-2147483648)
    b_q_lo = tl.load(q_lo + o_m, mask=m_m, other=0) if HAS_LO else b_q_idx
    return b_q_idx, b_q_lo


@triton.jit
def load_key_numbers(k_idx, o_n, seqlen_k):
    """Return the numbers of keys o_n, beyond all numbers from seqlen_k on.

    Without k_idx the numbers are o_n.
    """
    if k_idx is None:
        b_k_idx = tl.where(o_n < seqlen_k, o_n, 2147483647)
    else:
        b_k_idx = tl.load(k_idx + o_n, mask=o_n < seqlen_k, other=2147483647)
    return b_k_idx


@triton.jit
def store_delta(
    p_out, p_dout, p_delta, start, seqlen_q, stride_os, stride_dout_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store delta = dout . out of a tile of queries; return (dout, delta)."""
    o_m = start + tl.arange(0, BLOCK_M)
    b_out = load_tile(p_out, start, seqlen_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_dout = load_tile(p_dout, start, seqlen_q, stride_dout_s, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_delta = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    tl.store(p_delta + o_m, b_delta, mask=o_m < seqlen_q)
    return b_dout, b_delta


@triton.jit
def load_lse(p_lse, p_lse2, o_m, m_m):
    """Return lse of a tile of queries in base 2, and store it for the kernel that owns keys.

    That kernel loads it for every tile of keys, so it is converted once. Rows past the end have
    inf: their weights exp(-inf) are 0, masked or not.
    """
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf")) * LOG2E
    tl.store(p_lse2 + o_m, b_lse, mask=m_m)
    return b_lse


@triton.jit
def load_pair(
    x, y, at, start, seqlen, stride_xs, stride_ys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return the same tile of two tensors, 0 past the end; EVEN: nothing is past the end.

    x, y, at: as `loop_sources` returns them.
    """
    if DESCRIBED:
        b_x = load_box(x, at, start, BLOCK_S, BLOCK_D)
        b_y = load_box(y, at, start, BLOCK_S, BLOCK_D)
    else:
        b_x = load_tile(x, start, seqlen, stride_xs, BLOCK_S, HEAD_DIM, BLOCK_D, EVEN)
        b_y = load_tile(y, start, seqlen, stride_ys, BLOCK_S, HEAD_DIM, BLOCK_D, EVEN)
    return b_x, b_y


@triton.jit
def load_query_tile(
    q, dout, at, p_lse, p_delta, start, seqlen_q, stride_qs, stride_dout_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (q, dout, lse, delta) of a tile of queries, for a kernel that owns keys; lse base 2.

    q, dout, at: as `loop_sources` returns them. Rows past the end have lse = inf, so that their
    weights are 0. EVEN_M: there are none.
    """
    b_q, b_dout = load_pair(
        q, dout, at, start, seqlen_q, stride_qs, stride_dout_s, HEAD_DIM, BLOCK_D, BLOCK_M, EVEN_M,
        DESCRIBED,
    )  # fmt: skip
    o_m = start + tl.arange(0, BLOCK_M)
    if EVEN_M:
        # First the scalar, so that a thread's offsets are loop invariant.
        o_m = tl.arange(0, BLOCK_M)
        b_lse, b_delta = tl.load(p_lse + start + o_m), tl.load(p_delta + start + o_m)
    else:
        m_m = o_m < seqlen_q
        b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
    return b_q, b_dout, b_lse, b_delta


@triton.jit
def hide_keys(
    b_s, start, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr
):
    """Return scores of a tile of keys, -inf where a query does not see a key."""
    b_k_idx = load_key_numbers(k_idx, start + tl.arange(0, BLOCK_N), seqlen_k)
    m_s = is_visible(b_q_idx[:, None], b_q_lo[:, None], b_k_idx[None, :], HAS_LO)
    return tl.where(m_s, b_s, float("-inf"))


@triton.jit
def weigh(b_s, b_max, b_sum, qk_scale):
    """Return (weights, factor of earlier sums, max, sum) after one more tile of scores q . k."""
    qk_scale = tl.maximum(qk_scale, LEAST_SCALE)
    # As qk_scale > 0, the maximum is scaled once a row, and a score in one fused operation.
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * qk_scale)
    b_p = tl.exp2(b_s * qk_scale - b_new[:, None])
    b_rescale = tl.exp2(b_max - b_new)
    return b_p, b_rescale, b_new, b_sum * b_rescale + tl.sum(b_p, 1)


@triton.jit
def fwd_step(
    b_q, b_out, b_max, b_sum, p_k, p_v, i_n, seqlen_k, stride_ks, stride_vs, qk_scale, b_q_idx,
    b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) of a tile of queries after one more tile of keys.

    b_out, b_max, b_sum: running sum of values, greatest score (base 2) and sum of weights. MASKED:
    some keys are hidden or past the end; else every query sees every key of the tile.
    """
    start = i_n * BLOCK_N
    b_k = load_tile(p_k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if MASKED:
        b_s = hide_keys(b_s, start, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_N, HAS_LO)
    b_p, b_rescale, b_max, b_sum = weigh(b_s, b_max, b_sum, qk_scale)
    b_v = load_tile(p_v, start, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
    return b_out, b_max, b_sum


@triton.jit
def fwd_loop(
    b_q, k, v, at, lo, full_lo, full_hi, hi, seqlen_k, stride_ks, stride_vs, qk_scale, b_q_idx,
    b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (out, max, sum) of a tile of queries after tiles lo to hi of keys, as `fwd_step`.

    k, v, at: as `loop_sources` returns them. Tiles in [full_lo, full_hi) need no mask. By
    descriptors b_q_idx may be None: then no tile needs one.

    By descriptors, the values of a tile are added one step later, while the next tile's softmax is
    computed. Its weights are kept in fp32, as copies of rounded ones would cost more registers. By
    pointers there are no registers left for that.
    """
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if DESCRIBED:
        b_rescale = tl.zeros([BLOCK_M], tl.float32)
        b_p = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(lo, hi):
            b_k = load_box(k, at, i * BLOCK_N, BLOCK_N, BLOCK_D)
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_v = load_box(v, at, tl.maximum(i - 1, lo) * BLOCK_N, BLOCK_N, BLOCK_D)
            b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
            if b_q_idx is not None:  # noqa: SIM102, a constant of the kernel
                if (i < full_lo) | (i >= full_hi):
                    b_s = hide_keys(
                        b_s, i * BLOCK_N, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_N, HAS_LO
                    )
            b_p, b_rescale, b_max, b_sum = weigh(b_s, b_max, b_sum, qk_scale)
        if hi > lo:
            b_v = load_box(v, at, (hi - 1) * BLOCK_N, BLOCK_N, BLOCK_D)
            b_out = dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None])
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(first, stop):
                b_out, b_max, b_sum = fwd_step(
                    b_q, b_out, b_max, b_sum, k, v, i, seqlen_k, stride_ks, stride_vs, qk_scale,
                    b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, part != 1,
                )  # fmt: skip
    return b_out, b_max, b_sum


@triton.jit
def _ds_step(
    b_q, b_dout, b_lse, b_delta, p_k, p_v, i_n, seqlen_k, stride_ks, stride_vs, qk_scale,
    b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the gradients of a tile's scores, and its keys; arguments as of `dq_step`."""
    start = i_n * BLOCK_N
    b_k = load_tile(p_k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_v = load_tile(p_v, start, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_p = tl.exp2(b_s * qk_scale - b_lse[:, None])
    if MASKED:
        o_n = start + tl.arange(0, BLOCK_N)
        b_k_idx = load_key_numbers(k_idx, o_n, seqlen_k)
        m_s = is_visible(b_q_idx[:, None], b_q_lo[:, None], b_k_idx[None, :], HAS_LO)
        b_p = tl.where(m_s, b_p, 0.0)
    b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    return b_p * (b_dp - b_delta[:, None]), b_k


@triton.jit
def dq_step(
    b_q, b_dout, b_dq, b_lse, b_delta, p_k, p_v, i_n, seqlen_k, stride_ks, stride_vs, qk_scale,
    b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return dq of a tile of queries, without softmax_scale, after one more tile of keys.

    b_lse: of the whole row, base 2. b_delta: dout . out. MASKED as in `fwd_step`.
    """
    b_ds, b_k = _ds_step(
        b_q, b_dout, b_lse, b_delta, p_k, p_v, i_n, seqlen_k, stride_ks, stride_vs, qk_scale,
        b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, MASKED,
    )  # fmt: skip
    return dot(b_ds.to(b_k.dtype), b_k, b_dq)


@triton.jit
def dq_loop(
    b_q, b_dout, b_lse, b_delta, k, v, at, lo, full_lo, full_hi, hi, seqlen_k, stride_ks, stride_vs,
    qk_scale, b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, DESCRIBED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Return (dq, sums) of a tile of queries after tiles lo to hi of keys; no softmax_scale in dq.

    Arguments as in `fwd_loop` and `dq_step`. SUMS: sum the gradients of each row's scores; else the
    sums are 0.
    """
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sums = tl.zeros([BLOCK_M], tl.float32)
    if DESCRIBED:
        for i in range(lo, hi):
            start = i * BLOCK_N
            b_k = load_box(k, at, start, BLOCK_N, BLOCK_D)
            b_v = load_box(v, at, start, BLOCK_N, BLOCK_D)
            # Both products go before the exponentials, which then run beside the second.
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_p = tl.exp2(b_s * qk_scale - b_lse[:, None])
            if b_q_idx is not None:  # noqa: SIM102, a constant of the kernel
                if (i < full_lo) | (i >= full_hi):
                    b_k_idx = load_key_numbers(k_idx, start + tl.arange(0, BLOCK_N), seqlen_k)
                    m_s = is_visible(b_q_idx[:, None], b_q_lo[:, None], b_k_idx[None, :], HAS_LO)
                    b_p = tl.where(m_s, b_p, 0.0)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if SUMS:
                b_sums += tl.sum(b_ds, 1)
            b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(first, stop):
                b_ds, b_k = _ds_step(
                    b_q, b_dout, b_lse, b_delta, k, v, i, seqlen_k, stride_ks, stride_vs, qk_scale,
                    b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, part != 1,
                )  # fmt: skip
                if SUMS:
                    b_sums += tl.sum(b_ds, 1)
                b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
    return b_dq, b_sums

"""Steps of LSSA's and LSSAR's kernels: one tile of scores, and all tiles of a band.

    f = max(s, 0) + d P(d),  d = 2^-|s| in (0, 1]                      sigma = 2^(s - f)

s and f are those of `tiled` times log2 e: queries come with that factor, which saves a product a
score, and results are the same for any factor of f. P is the polynomial that brings y P(y) closest
to log2(1 + y) on (0, 1] in relative error, rounding included: 8.5e-6 with 6 coefficients for half
precision, 3.3e-7 with 8 for fp32. The error is relative, so rows whose scores are all far below 0,
where f is 2^s log2 e, keep their weights. The polynomial needs one special function less than a
logarithm; these kernels compute more exponentials than full attention. For the sum of f alone,
log2 of the product of 1 + d over a tile takes its place. A hidden score is -inf, where d, f, sigma
and the weight are exactly 0.

By descriptors, what follows from the scores of a tile is added one step later, so that its products
run beside the next tile's exponentials. What is carried until then is fp32: rounded values would
be copied through shared memory.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false

import triton
import triton.language as tl

from lcdist_kernels.softmax_steps import (
    hide_keys,
    is_visible,
    load_limits,
    load_pair,
    part_of,
)
from lcdist_kernels.triton_common import INTERPRETED, dot, load_box, load_tile, reciprocal

# Bits of a power that is a compile-time constant.
POWER_BITS = tl.constexpr(6)


@triton.jit
def decay(b_s):
    """Return exp2(-|s|)."""
    # A product with -1, not a negation, which Triton makes a difference to 0, an instruction more.
    return tl.exp2(tl.abs(b_s) * -1.0)


@triton.jit
def softplus(b_s, b_d, PRECISE: tl.constexpr):
    """Return log2(1 + 2^s) from s and exp2(-|s|)."""
    if PRECISE:
        b_p = b_d * -0.012319474765512508 + 0.0636079036212389
        b_p = b_p * b_d - 0.1553518998389655
        b_p = b_p * b_d + 0.25600974693677014
        b_p = b_p * b_d - 0.35339484264543597
        b_p = b_p * b_d + 0.4800637004961981
        b_p = b_p * b_d - 0.7213100886670026
        b_p = b_p * b_d + 1.4426947605400304
    else:
        b_p = b_d * -0.034435908958955805 + 0.14603291343586
        b_p = b_p * b_d - 0.30303624837833515
        b_p = b_p * b_d + 0.46917409375664315
        b_p = b_p * b_d - 0.7204261714146781
        b_p = b_p * b_d + 1.4426829200528553
    return tl.maximum(b_s, 0.0) + b_p * b_d


@triton.jit
def sigmoid(b_s, b_d, b_f, BY_F: tl.constexpr):
    """Return 1 / (1 + 2^-s) from s, exp2(-|s|) and f.

    BY_F: as 2^(s - f), off by as much as f is: two instructions instead of five where f is needed
    anyway.
    """
    return tl.exp2(b_s - b_f) if BY_F else tl.where(b_s >= 0, 1.0, b_d) * reciprocal(1.0 + b_d)


@triton.jit
def ratio(b_f, b_least, b_inverse, SHARP: tl.constexpr):
    """Return y = relu(f - mean) inverse, or f inverse for LSSA (not SHARP).

    b_least: mean inverse. One fused operation; rounding b_least moves a row as much as rounding the
    mean does.
    """
    b_y = b_f * b_inverse
    if SHARP:
        b_y = tl.maximum(b_y - b_least, 0.0)
    return b_y


@triton.jit
def powers(b_y, power, TIMES: tl.constexpr, SHARP: tl.constexpr):
    """Return (y^p, y^(p-1)), both 0 where y is 0, or (y, 1) for LSSA (not SHARP).

    TIMES: p - 1 where that is an integer of at most POWER_BITS bits, else -1.
    """
    b_x = tl.full(b_y.shape, 1.0, tl.float32)
    b_w = b_y
    if SHARP:
        if TIMES > 0:
            b_square = b_y
            for i in tl.static_range(0, POWER_BITS):
                if (TIMES >> i) & 1 == 1:
                    b_x = b_x * b_square
                if TIMES >> (i + 1) > 0:
                    b_square = b_square * b_square
        elif TIMES == 0:
            b_x = tl.where(b_y > 0, 1.0, 0.0)
        else:
            b_x = tl.exp2((power - 1.0) * tl.log2(tl.maximum(b_y, 1e-37)))
            b_x = tl.where(b_y > 0, b_x, 0.0)
        b_w = b_y * b_x
    return b_w, b_x


@triton.jit
def ratio_and_slope(
    b_s, b_least, b_inverse, PRECISE: tl.constexpr, SHARP: tl.constexpr, BY_F: tl.constexpr
):
    """Return (y, sigma) of scores. BY_F as in `sigmoid`."""
    b_d = decay(b_s)
    b_f = softplus(b_s, b_d, PRECISE)
    return ratio(b_f, b_least, b_inverse, SHARP), sigmoid(b_s, b_d, b_f, BY_F)


@triton.jit
def _by_thread(b, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return a tile as `[BLOCK_M, BLOCK_N // 8, 4, 2]`.

    A thread of a tensor core holds two columns of every eight, so results over the second and the
    last dimension, `[BLOCK_M, 4]`, need no exchange between threads: that is left for the end.
    """
    return tl.reshape(b, [BLOCK_M, BLOCK_N // 8, 4, 2])


@triton.jit
def _either(a, b):
    """Return (1 + a) (1 + b) - 1, which keeps the digits of small a and b."""
    return a + b + a * b


@triton.jit
def _fold(b_d, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Return `_either` of columns that are a multiple of 4 apart: `[BLOCK_M, 4]`."""
    b_a, b_b = tl.split(tl.permute(tl.reshape(b_d, [BLOCK_M, 2, WIDTH // 2]), [0, 2, 1]))
    b_a = _either(b_a, b_b)
    return b_a if WIDTH == 8 else _fold(b_a, BLOCK_M, WIDTH // 2)


@triton.jit
def _products(b_d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return products of 1 + d, less 1, by threads: `[BLOCK_M, 4]`."""
    if INTERPRETED:
        # The interpreter calls a function of two numbers once for each number.
        b_a, b_b = tl.split(tl.reshape(b_d, [BLOCK_M, BLOCK_N // 2, 2]))
        b_product = _fold(_either(b_a, b_b), BLOCK_M, BLOCK_N // 2)
    else:
        b_pairs = tl.reduce(_by_thread(b_d, BLOCK_M, BLOCK_N), 3, _either)
        b_product = tl.reduce(b_pairs, 1, _either)
    return b_product


@triton.jit
def _log2_of_1_and(b_x):
    """Return log2(1 + x) of x >= 0, with the relative accuracy of fp32."""
    b_small = softplus(-tl.abs(b_x), tl.minimum(b_x, 1.0), True)
    return tl.where(b_x <= 1, b_small, tl.log2(1.0 + b_x))


@triton.jit
def _sums_step(
    b_q, b_sum, b_excess, b_max, k, at, i_n, masked, seqlen_k, stride_ks, b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, EVEN: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (sums of f, compensations, maximum scores) by threads after one more tile of keys.

    masked: whether a key is hidden. EVEN: no key is past the end. The logarithms of a thread are
    that of a product, which does not overflow with 64 factors of at most 2.
    """
    tl.static_assert(BLOCK_N <= 256)
    start = i_n * BLOCK_N
    if DESCRIBED:
        b_k = load_box(k, at, start, BLOCK_N, BLOCK_D)
    else:
        b_k = load_tile(k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, EVEN)
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if masked:
        b_s = hide_keys(b_s, start, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_N, HAS_LO)
    b_f = tl.sum(tl.sum(_by_thread(tl.maximum(b_s, 0.0), BLOCK_M, BLOCK_N), 3), 1)
    b_f += _log2_of_1_and(_products(decay(b_s), BLOCK_M, BLOCK_N))
    # Compensated (Kahan): plain sums drift over thousands of tiles of equal scores, and a flat row
    # is recognised by a maximum that equals its mean.
    b_more = b_f - b_excess
    b_new = b_sum + b_more
    b_excess = (b_new - b_sum) - b_more
    b_top = tl.max(tl.max(_by_thread(b_s, BLOCK_M, BLOCK_N), 3), 1)
    return b_new, b_excess, tl.maximum(b_max, b_top)


@triton.jit
def sums_sweep(
    b_q, k, at, lo, full_lo, full_hi, hi, seqlen_k, stride_ks, b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, PRECISE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return the sum and the maximum of f of every row of a tile of queries.

    k, at: as `loop_sources` returns them. Tiles in [full_lo, full_hi) need no mask.

    The other sweeps compute f by a polynomial. So the maximum is by it too, and the sum is scaled
    as the polynomial scales the maximum: scores of a nearly flat row are all as wrong as that, and
    their differences from the mean stay right.
    """
    b_sum = tl.zeros([BLOCK_M, 4], tl.float32)
    b_excess = tl.zeros([BLOCK_M, 4], tl.float32)
    b_max = tl.full([BLOCK_M, 4], float("-inf"), tl.float32)
    if DESCRIBED:
        for i in range(lo, hi):
            b_sum, b_excess, b_max = _sums_step(
                b_q, b_sum, b_excess, b_max, k, at, i, (i < full_lo) | (i >= full_hi), seqlen_k,
                stride_ks, b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
                False, True,
            )  # fmt: skip
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(0, stop - first):
                b_sum, b_excess, b_max = _sums_step(
                    b_q, b_sum, b_excess, b_max, k, at, first + i, part != 1, seqlen_k, stride_ks,
                    b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, part == 1,
                    False,
                )  # fmt: skip
    b_sum, b_max = tl.sum(b_sum, 1), tl.max(b_max, 1)
    b_d = decay(b_max)
    b_true = tl.maximum(b_max, 0.0) + _log2_of_1_and(b_d)
    b_top = softplus(b_max, b_d, PRECISE)
    return b_sum * tl.where(b_true > 0, b_top / tl.where(b_true > 0, b_true, 1.0), 0.0), b_top


@triton.jit
def _weigh(
    b_y, b_sum, b_sum_x, power, dtype: tl.constexpr,
    TIMES: tl.constexpr, SHARP: tl.constexpr, SLOPE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return (y^p, y^(p-1)) of a tile of ratios, rounded, and (W, W') with them, `[BLOCK_M, 8]`.

    The sums are over columns 8 apart, which one thread holds.
    """
    b_w, b_x = powers(b_y, power, TIMES, SHARP)
    b_sum += tl.sum(tl.reshape(b_w, [BLOCK_M, BLOCK_N // 8, 8]), 1)
    if SLOPE:
        b_sum_x += tl.sum(tl.reshape(b_x, [BLOCK_M, BLOCK_N // 8, 8]), 1)
    return b_w.to(dtype), b_x.to(dtype), b_sum, b_sum_x


@triton.jit
def _add_values(b_out, b_out_x, b_w, b_x, b_v, SLOPE: tl.constexpr):
    """Return (A, A') with the values of one more tile; see `tiled`."""
    b_out = dot(b_w, b_v, b_out)
    if SLOPE:
        b_out_x = dot(b_x, b_v, b_out_x)
    return b_out, b_out_x


@triton.jit
def power_sweep(
    b_q, b_least, b_inverse, k, v, at, lo, full_lo, full_hi, hi, seqlen_k, stride_ks, stride_vs,
    power, b_q_idx, b_q_lo, k_idx,
    TIMES: tl.constexpr, SHARP: tl.constexpr, SLOPE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr,
    PRECISE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return A, W, and with SLOPE A' and W', of every row of a tile of queries.

    k, v, at and the tiles: as in `sums_sweep`. By descriptors, the powers of a tile are computed
    before the next tile's scores, while the products of the tile before it run.
    """
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_M, 8], tl.float32)
    # Without SLOPE these stay zero and the compiler removes them.
    b_out_x = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum_x = tl.zeros([BLOCK_M, 8], tl.float32)
    if DESCRIBED:
        b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(lo, hi):
            b_w, b_x, b_sum, b_sum_x = _weigh(
                b_y, b_sum, b_sum_x, power, b_q.dtype, TIMES, SHARP, SLOPE, BLOCK_M, BLOCK_N
            )
            b_k = load_box(k, at, i * BLOCK_N, BLOCK_N, BLOCK_D)
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_v = load_box(v, at, tl.maximum(i - 1, lo) * BLOCK_N, BLOCK_N, BLOCK_D)
            b_out, b_out_x = _add_values(b_out, b_out_x, b_w, b_x, b_v, SLOPE)
            if (i < full_lo) | (i >= full_hi):
                b_s = hide_keys(b_s, i * BLOCK_N, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_N, HAS_LO)
            b_f = softplus(b_s, decay(b_s), PRECISE)
            b_y = ratio(b_f, b_least[:, None], b_inverse[:, None], SHARP)
        if hi > lo:
            b_w, b_x, b_sum, b_sum_x = _weigh(
                b_y, b_sum, b_sum_x, power, b_q.dtype, TIMES, SHARP, SLOPE, BLOCK_M, BLOCK_N
            )
            b_v = load_box(v, at, (hi - 1) * BLOCK_N, BLOCK_N, BLOCK_D)
            b_out, b_out_x = _add_values(b_out, b_out_x, b_w, b_x, b_v, SLOPE)
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(0, stop - first):
                o_n, even = (first + i) * BLOCK_N, part == 1
                b_k = load_tile(k, o_n, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, even)
                b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
                if not even:
                    b_s = hide_keys(b_s, o_n, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_N, HAS_LO)
                b_f = softplus(b_s, decay(b_s), PRECISE)
                b_y = ratio(b_f, b_least[:, None], b_inverse[:, None], SHARP)
                b_v = load_tile(v, o_n, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, even)
                b_w, b_x, b_sum, b_sum_x = _weigh(
                    b_y, b_sum, b_sum_x, power, b_q.dtype, TIMES, SHARP, SLOPE, BLOCK_M, BLOCK_N
                )
                b_out, b_out_x = _add_values(b_out, b_out_x, b_w, b_x, b_v, SLOPE)
    return b_out, tl.sum(b_sum, 1), b_out_x, tl.sum(b_sum_x, 1)


@triton.jit
def _add_keys(
    b_dout, b_dq, b_y, b_z, b_delta, b_drift, b_k, b_v, power,
    TIMES: tl.constexpr, SHARP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return dq with a tile of keys, whose ratios and slopes are y and z.

    dq and drift are in units of p gamma, so that the factors of half-precision products stay small.
    """
    b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    _, b_x = powers(b_y, power, TIMES, SHARP)
    b_df = b_x * (b_dp - b_delta[:, None])
    if SHARP:
        b_df = b_df - b_drift[:, None]
    return dot((b_df * b_z).to(b_k.dtype), b_k, b_dq)


@triton.jit
def dq_sweep(
    b_q, b_dout, b_least, b_gamma, b_delta, b_drift, k, v, at, lo, full_lo, full_hi, hi, seqlen_k,
    stride_ks, stride_vs, power, b_q_idx, b_q_lo, k_idx,
    TIMES: tl.constexpr, SHARP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return dq of a tile of queries in units of p gamma.

    k, v, at and the tiles: as in `sums_sweep`. By descriptors, keys are loaded again for their
    share one step later.
    """
    # LSSA's weights need no f here.
    BY_F: tl.constexpr = SHARP and (not PRECISE)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if DESCRIBED:
        b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b_z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(lo, hi):
            b_k = load_box(k, at, i * BLOCK_N, BLOCK_N, BLOCK_D)
            b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            b_k, b_v = load_pair(
                k, v, at, tl.maximum(i - 1, lo) * BLOCK_N, seqlen_k, stride_ks, stride_vs, HEAD_DIM,
                BLOCK_D, BLOCK_N, False, True,
            )  # fmt: skip
            b_dq = _add_keys(
                b_dout, b_dq, b_y, b_z, b_delta, b_drift, b_k, b_v, power, TIMES, SHARP, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
            if (i < full_lo) | (i >= full_hi):
                b_s = hide_keys(b_s, i * BLOCK_N, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_N, HAS_LO)
            b_y, b_z = ratio_and_slope(
                b_s, b_least[:, None], b_gamma[:, None], PRECISE, SHARP, BY_F
            )
        if hi > lo:
            b_k, b_v = load_pair(
                k, v, at, (hi - 1) * BLOCK_N, seqlen_k, stride_ks, stride_vs, HEAD_DIM, BLOCK_D,
                BLOCK_N, False, True,
            )  # fmt: skip
            b_dq = _add_keys(
                b_dout, b_dq, b_y, b_z, b_delta, b_drift, b_k, b_v, power, TIMES, SHARP, BLOCK_M,
                BLOCK_N,
            )  # fmt: skip
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(0, stop - first):
                o_n, even = (first + i) * BLOCK_N, part == 1
                b_k, b_v = load_pair(
                    k, v, at, o_n, seqlen_k, stride_ks, stride_vs, HEAD_DIM, BLOCK_D, BLOCK_N, even,
                    False,
                )  # fmt: skip
                b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
                if not even:
                    b_s = hide_keys(b_s, o_n, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_N, HAS_LO)
                b_y, b_z = ratio_and_slope(
                    b_s, b_least[:, None], b_gamma[:, None], PRECISE, SHARP, BY_F
                )
                b_dq = _add_keys(
                    b_dout, b_dq, b_y, b_z, b_delta, b_drift, b_k, b_v, power, TIMES, SHARP,
                    BLOCK_M, BLOCK_N,
                )  # fmt: skip
    return b_dq


@triton.jit
def _load_row(p, start, seqlen_q, BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr):
    """Return a statistic of a tile of queries, 0 past the end; EVEN_M: nothing is past the end."""
    o_m = tl.arange(0, BLOCK_M)
    if EVEN_M:
        # First the scalar, so that a thread's offsets are loop invariant.
        b = tl.load(p + start + o_m)
    else:
        b = tl.load(p + (start + o_m), mask=start + o_m < seqlen_q, other=0.0)
    return b


@triton.jit
def _ratios_of_rows(
    b_s, p_least, p_gamma, start, masked, seqlen_q, q_idx, q_lo, b_k_idx,
    SHARP: tl.constexpr, BLOCK_M: tl.constexpr, HAS_LO: tl.constexpr, PRECISE: tl.constexpr,
    EVEN_M: tl.constexpr,
):  # fmt: skip
    """Return (y, sigma) of transposed scores of a tile of queries.

    masked: whether a query may not see a key. Rows past the end have gamma = 0.
    """
    b_least = _load_row(p_least, start, seqlen_q, BLOCK_M, EVEN_M)
    b_gamma = _load_row(p_gamma, start, seqlen_q, BLOCK_M, EVEN_M)
    if masked:
        o_m = start + tl.arange(0, BLOCK_M)
        b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, o_m < seqlen_q, HAS_LO)
        m_s = is_visible(b_q_idx[None, :], b_q_lo[None, :], b_k_idx[:, None], HAS_LO)
        b_s = tl.where(m_s, b_s, float("-inf"))
    return ratio_and_slope(b_s, b_least[None, :], b_gamma[None, :], PRECISE, SHARP, not PRECISE)


@triton.jit
def _add_rows(
    b_v, b_dk, b_dv, b_y, b_z, b_q, b_dout, p_gamma, p_offset, p_share, start, seqlen_q, power,
    TIMES: tl.constexpr, SHARP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) with a tile of queries, whose transposed ratios and slopes are y and z.

    dk is in units of p. By descriptors dP runs beside the powers. By pointers it comes last: before
    the exponentials it was slower on a GPU.
    """
    if DESCRIBED:
        b_dp = dot(b_v, tl.trans(b_dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    b_w, b_x = powers(b_y, power, TIMES, SHARP)
    b_dv = dot(b_w.to(b_dout.dtype), b_dout, b_dv)
    if not DESCRIBED:
        b_dp = dot(b_v, tl.trans(b_dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    b_gamma = _load_row(p_gamma, start, seqlen_q, BLOCK_M, EVEN_M)
    b_offset = _load_row(p_offset, start, seqlen_q, BLOCK_M, EVEN_M)
    b_share = _load_row(p_share, start, seqlen_q, BLOCK_M, EVEN_M)
    if b_q.dtype == tl.float16:
        # gamma of a nearly flat row exceeds fp16, so factors are in units of the tile's maximum.
        unit = tl.max(b_gamma, 0)
        unit = tl.where(unit > 0, unit, 1.0)
        b_gamma = b_gamma / unit
        b_offset = b_offset / unit
        b_share = b_share / unit
    b_df = b_x * (b_dp * b_gamma[None, :] - b_offset[None, :])
    if SHARP:
        b_df = b_df - b_share[None, :]
    b_ds = (b_df * b_z).to(b_q.dtype)
    if b_q.dtype == tl.float16:
        b_dk += dot(b_ds, b_q, tl.zeros([BLOCK_N, BLOCK_D], tl.float32)) * unit
    else:
        b_dk = dot(b_ds, b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def dkv_sweep(
    b_k, b_v, b_dk, b_dv, q, dout, at, p_least, p_gamma, p_offset, p_share, lo, full_lo, full_hi,
    hi, seqlen_q, stride_qs, stride_dout_s, power, q_idx, q_lo, b_k_idx,
    TIMES: tl.constexpr, SHARP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, PRECISE: tl.constexpr,
    EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) of a tile of keys after tiles lo to hi of queries of one head.

    Scores are transposed, `[BLOCK_N, BLOCK_M]`. q, dout, at: as `loop_sources` returns them. Tiles
    in [full_lo, full_hi) need no mask. By descriptors, queries are loaded again for their share one
    step later.
    """
    if DESCRIBED:
        b_y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        b_z = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for i in range(lo, hi):
            o_m, before = i * BLOCK_M, tl.maximum(i - 1, lo) * BLOCK_M
            b_q = load_box(q, at, o_m, BLOCK_M, BLOCK_D)
            b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
            b_dout, b_q = load_pair(
                dout, q, at, before, seqlen_q, stride_dout_s, stride_qs, HEAD_DIM, BLOCK_D, BLOCK_M,
                False, True,
            )  # fmt: skip
            b_dk, b_dv = _add_rows(
                b_v, b_dk, b_dv, b_y, b_z, b_q, b_dout, p_gamma, p_offset, p_share, before,
                seqlen_q, power, TIMES, SHARP, BLOCK_D, BLOCK_M, BLOCK_N, EVEN_M, True,
            )  # fmt: skip
            b_y, b_z = _ratios_of_rows(
                b_s, p_least, p_gamma, o_m, (i < full_lo) | (i >= full_hi), seqlen_q, q_idx, q_lo,
                b_k_idx, SHARP, BLOCK_M, HAS_LO, PRECISE, EVEN_M,
            )  # fmt: skip
        if hi > lo:
            last = (hi - 1) * BLOCK_M
            b_dout, b_q = load_pair(
                dout, q, at, last, seqlen_q, stride_dout_s, stride_qs, HEAD_DIM, BLOCK_D, BLOCK_M,
                False, True,
            )  # fmt: skip
            b_dk, b_dv = _add_rows(
                b_v, b_dk, b_dv, b_y, b_z, b_q, b_dout, p_gamma, p_offset, p_share, last, seqlen_q,
                power, TIMES, SHARP, BLOCK_D, BLOCK_M, BLOCK_N, EVEN_M, True,
            )  # fmt: skip
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(0, stop - first):
                o_m = (first + i) * BLOCK_M
                b_q, b_dout = load_pair(
                    q, dout, at, o_m, seqlen_q, stride_qs, stride_dout_s, HEAD_DIM, BLOCK_D,
                    BLOCK_M, EVEN_M, False,
                )  # fmt: skip
                b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
                b_y, b_z = _ratios_of_rows(
                    b_s, p_least, p_gamma, o_m, part != 1, seqlen_q, q_idx, q_lo, b_k_idx, SHARP,
                    BLOCK_M, HAS_LO, PRECISE, EVEN_M,
                )  # fmt: skip
                b_dk, b_dv = _add_rows(
                    b_v, b_dk, b_dv, b_y, b_z, b_q, b_dout, p_gamma, p_offset, p_share, o_m,
                    seqlen_q, power, TIMES, SHARP, BLOCK_D, BLOCK_M, BLOCK_N, EVEN_M, False,
                )  # fmt: skip
    return b_dk, b_dv

"""Steps of LSSA's and LSSAR's kernels: one tile of scores, and all tiles of a band.

    f = max(s, 0) + d P(d),  d = 2^-|s| in (0, 1]          sigma = (1 if s >= 0 else d) / (1 + d)

s and f are those of `tiled` times log2 e: queries come with that factor, which saves a product a
score, and results are the same for any factor of f. P is the polynomial that brings y P(y) closest
to log2(1 + y) on (0, 1] in relative error, rounding included: 8.5e-6 with 6 coefficients for half
precision, 3.3e-7 with 8 for fp32. The error is relative, so rows whose scores are all far below 0,
where f is 2^s log2 e, keep their weights. The polynomial needs one special function less than a
logarithm; these kernels compute more exponentials than full attention. For the sum of f alone,
log2 of the product of 1 + d over a tile takes its place. A hidden score is -inf, where d, f, sigma
and the weight are exactly 0.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from lcdist_kernels.softmax_steps import (
    is_visible,
    load_limits,
    nth_masked,
)
from lcdist_kernels.triton_common import INTERPRETED, dot, load_tile, reciprocal

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
def sigmoid(b_s, b_d):
    """Return 1 / (1 + 2^-s) from s and exp2(-|s|)."""
    return tl.where(b_s >= 0, 1.0, b_d) * reciprocal(1.0 + b_d)


@triton.jit
def weights(b_f, b_mean, b_inverse, power, TIMES: tl.constexpr, SHARP: tl.constexpr):
    """Return (y^p, y^(p-1)) of y = relu(f - mean) inverse, both 0 where y is 0.

    For LSSA (not SHARP) return (f inverse, 1). TIMES: p - 1 where that is an integer of at most
    POWER_BITS bits, else -1.
    """
    if SHARP:
        b_y = tl.maximum(b_f - b_mean, 0.0) * b_inverse
        if TIMES > 0:
            b_x = tl.full(b_y.shape, 1.0, tl.float32)
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
    else:
        b_w = b_f * b_inverse
        b_x = tl.full(b_f.shape, 1.0, tl.float32)
    return b_w, b_x


@triton.jit
def scores(
    b_q, b_k, start, seqlen_k, b_q_idx, b_q_lo, k_idx,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return q . k for the keys from `start` on, -inf where hidden."""
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    if MASKED:
        o_n = start + tl.arange(0, BLOCK_N)
        b_k_idx = tl.load(k_idx + o_n, mask=o_n < seqlen_k, other=2147483647)
        m_s = is_visible(b_q_idx[:, None], b_q_lo[:, None], b_k_idx[None, :], HAS_LO)
        b_s = tl.where(m_s, b_s, float("-inf"))
    return b_s


@triton.jit
def _either(a, b):
    """Return (1 + a) (1 + b) - 1, which keeps the digits of small a and b."""
    return a + b + a * b


@triton.jit
def _product(b_d, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the product of 1 + d over each row, less 1: `[BLOCK_M]`."""
    if INTERPRETED:
        # The interpreter calls a function of two numbers once for each number.
        b_a, b_b = tl.split(tl.reshape(b_d, [BLOCK_M, BLOCK_N // 2, 2]))
        b_a = _either(b_a, b_b)
        b_product = b_a if BLOCK_N == 2 else _product(b_a, BLOCK_M, BLOCK_N // 2)
        b_product = tl.reshape(b_product, [BLOCK_M])
    else:
        b_product = tl.reduce(b_d, 1, _either)
    return b_product


@triton.jit
def _log2_of_1_and(b_x):
    """Return log2(1 + x) of x >= 0, with the relative accuracy of fp32."""
    b_small = softplus(-tl.abs(b_x), tl.minimum(b_x, 1.0), True)
    return tl.where(b_x <= 1, b_small, tl.log2(1.0 + b_x))


@triton.jit
def _sums_step(
    b_q, b_sum, b_excess, b_max, p_k, i_n, seqlen_k, stride_ks, b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (sum of f, compensation, maximum score) after one more tile of keys.

    The logarithms of a tile are that of a product, which does not overflow with 64 factors of at
    most 2.
    """
    tl.static_assert(BLOCK_N <= 64)
    start = i_n * BLOCK_N
    b_k = load_tile(p_k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = scores(
        b_q, b_k, start, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_M, BLOCK_N, HAS_LO, MASKED
    )
    b_f = tl.sum(tl.maximum(b_s, 0.0), 1) + _log2_of_1_and(_product(decay(b_s), BLOCK_M, BLOCK_N))
    # Compensated (Kahan): plain sums drift over thousands of tiles of equal scores, and a flat row
    # is recognised by a maximum that equals its mean.
    b_more = b_f - b_excess
    b_new = b_sum + b_more
    b_excess = (b_new - b_sum) - b_more
    return b_new, b_excess, tl.maximum(b_max, tl.max(b_s, 1))


@triton.jit
def sums_sweep(
    b_q, p_k, lo, full_lo, full_hi, hi, seqlen_k, stride_ks, b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Return the sum and the maximum of f of every row of a tile of queries.

    The other sweeps compute f by a polynomial. So the maximum is by it too, and the sum is scaled
    as the polynomial scales the maximum: scores of a nearly flat row are all as wrong as that, and
    their differences from the mean stay right.
    """
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_excess = tl.zeros([BLOCK_M], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for i in range(0, full_hi - full_lo):
        b_sum, b_excess, b_max = _sums_step(
            b_q, b_sum, b_excess, b_max, p_k, full_lo + i, seqlen_k, stride_ks, b_q_idx, b_q_lo,
            k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, False,
        )  # fmt: skip
    for i in range(0, (full_lo - lo) + (hi - full_hi)):
        i_n = nth_masked(i, lo, full_lo, full_hi)
        b_sum, b_excess, b_max = _sums_step(
            b_q, b_sum, b_excess, b_max, p_k, i_n, seqlen_k, stride_ks, b_q_idx, b_q_lo, k_idx,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, True,
        )  # fmt: skip
    b_d = decay(b_max)
    b_true = tl.maximum(b_max, 0.0) + _log2_of_1_and(b_d)
    b_top = softplus(b_max, b_d, PRECISE)
    return b_sum * tl.where(b_true > 0, b_top / tl.where(b_true > 0, b_true, 1.0), 0.0), b_top


@triton.jit
def _power_step(
    b_q, b_mean, b_inverse, b_out, b_sum, b_out_x, b_sum_x, p_k, p_v, i_n, seqlen_k, stride_ks,
    stride_vs, power, b_q_idx, b_q_lo, k_idx,
    TIMES: tl.constexpr, SHARP: tl.constexpr, SLOPE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr,
    PRECISE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (A, W, A', W') after one more tile of keys; see `tiled`."""
    start = i_n * BLOCK_N
    b_k = load_tile(p_k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = scores(
        b_q, b_k, start, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_M, BLOCK_N, HAS_LO, MASKED
    )
    b_f = softplus(b_s, decay(b_s), PRECISE)
    b_w, b_x = weights(b_f, b_mean[:, None], b_inverse[:, None], power, TIMES, SHARP)
    b_v = load_tile(p_v, start, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_sum += tl.sum(b_w, 1)
    b_out = dot(b_w.to(b_v.dtype), b_v, b_out)
    if SLOPE:
        b_sum_x += tl.sum(b_x, 1)
        b_out_x = dot(b_x.to(b_v.dtype), b_v, b_out_x)
    return b_out, b_sum, b_out_x, b_sum_x


@triton.jit
def power_sweep(
    b_q, b_mean, b_inverse, p_k, p_v, lo, full_lo, full_hi, hi, seqlen_k, stride_ks, stride_vs,
    power, b_q_idx, b_q_lo, k_idx,
    TIMES: tl.constexpr, SHARP: tl.constexpr, SLOPE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    """Return A, W, and with SLOPE A' and W', of every row of a tile of queries."""
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    # Without SLOPE these stay zero and the compiler removes them.
    b_out_x = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sum_x = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, full_hi - full_lo):
        b_out, b_sum, b_out_x, b_sum_x = _power_step(
            b_q, b_mean, b_inverse, b_out, b_sum, b_out_x, b_sum_x, p_k, p_v, full_lo + i, seqlen_k,
            stride_ks, stride_vs, power, b_q_idx, b_q_lo, k_idx, TIMES, SHARP, SLOPE, HEAD_DIM,
            BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, PRECISE, False,
        )  # fmt: skip
    for i in range(0, (full_lo - lo) + (hi - full_hi)):
        i_n = nth_masked(i, lo, full_lo, full_hi)
        b_out, b_sum, b_out_x, b_sum_x = _power_step(
            b_q, b_mean, b_inverse, b_out, b_sum, b_out_x, b_sum_x, p_k, p_v, i_n, seqlen_k,
            stride_ks, stride_vs, power, b_q_idx, b_q_lo, k_idx, TIMES, SHARP, SLOPE, HEAD_DIM,
            BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, PRECISE, True,
        )  # fmt: skip
    return b_out, b_sum, b_out_x, b_sum_x


@triton.jit
def dq_step(
    b_q, b_dout, b_dq, b_mean, b_gamma, b_delta, b_drift, p_k, p_v, i_n, seqlen_k, stride_ks,
    stride_vs, power, b_q_idx, b_q_lo, k_idx,
    TIMES: tl.constexpr, SHARP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, PRECISE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Return dq after one more tile of keys.

    dq and drift are in units of p gamma, so that the factors of half-precision products stay small.
    """
    start = i_n * BLOCK_N
    b_k = load_tile(p_k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_v = load_tile(p_v, start, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = scores(
        b_q, b_k, start, seqlen_k, b_q_idx, b_q_lo, k_idx, BLOCK_M, BLOCK_N, HAS_LO, MASKED
    )
    b_d = decay(b_s)
    b_f = softplus(b_s, b_d, PRECISE)
    b_w, b_x = weights(b_f, b_mean[:, None], b_gamma[:, None], power, TIMES, SHARP)
    b_dp = dot(b_dout, tl.trans(b_v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_df = b_x * (b_dp - b_delta[:, None])
    if SHARP:
        b_df = b_df - b_drift[:, None]
    return dot((b_df * sigmoid(b_s, b_d)).to(b_k.dtype), b_k, b_dq)


@triton.jit
def dkv_step(
    b_k, b_v, b_dk, b_dv, p_q, p_dout, p_mean, p_gamma, p_delta, p_drift, i_m, seqlen_q, stride_qs,
    stride_dout_s, power, q_idx, q_lo, b_k_idx,
    TIMES: tl.constexpr, SHARP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, PRECISE: tl.constexpr,
    EVEN_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) after one more tile of queries.

    Scores are transposed, `[BLOCK_N, BLOCK_M]`. Rows past the end have gamma = 0.
    """
    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_q = load_tile(p_q, start, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, EVEN_M)
    b_dout = load_tile(p_dout, start, seqlen_q, stride_dout_s, BLOCK_M, HEAD_DIM, BLOCK_D, EVEN_M)
    b_mean = tl.load(p_mean + o_m, mask=m_m, other=0.0)
    b_gamma = tl.load(p_gamma + o_m, mask=m_m, other=0.0)
    b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
    b_drift = tl.load(p_drift + o_m, mask=m_m, other=0.0)
    b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    if MASKED:
        b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, HAS_LO)
        m_s = is_visible(b_q_idx[None, :], b_q_lo[None, :], b_k_idx[:, None], HAS_LO)
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_d = decay(b_s)
    b_f = softplus(b_s, b_d, PRECISE)
    b_w, b_x = weights(b_f, b_mean[None, :], b_gamma[None, :], power, TIMES, SHARP)
    b_dv = dot(b_w.to(b_dout.dtype), b_dout, b_dv)
    b_dp = dot(b_v, tl.trans(b_dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    b_scale = b_gamma * power
    if b_q.dtype == tl.float16:
        # gamma of a nearly flat row exceeds fp16, so factors are in units of the tile's maximum.
        unit = tl.max(b_scale, 0)
        unit = tl.where(unit > 0, unit, 1.0)
        b_scale = b_scale / unit
        b_drift = b_drift / unit
    b_df = b_x * (b_dp - b_delta[None, :]) * b_scale[None, :]
    if SHARP:
        b_df = b_df - b_drift[None, :]
    b_ds = (b_df * sigmoid(b_s, b_d)).to(b_q.dtype)
    if b_q.dtype == tl.float16:
        b_dk += dot(b_ds, b_q, tl.zeros([BLOCK_N, BLOCK_D], tl.float32)) * unit
    else:
        b_dk = dot(b_ds, b_q, b_dk)
    return b_dk, b_dv

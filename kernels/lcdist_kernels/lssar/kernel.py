"""LSSA and LSSAR in Triton: the sweeps over keys of the forward, and those of the backward.

The sums and gradients are defined in `tiled`, f and its derivative, both in base 2, in
`inner_loop`. So queries, sums, maxima, means and 1 / gamma are those of `tiled` times log2 e; dq
and drift are divided by it; out, e / gamma, delta, dk and dv are the same. With m_i = p gamma_i of
a row, H_i = dout_i . e_i and h_i = o_i / N_i H_i,

    ds_ij = m_i z_ij,   z_ij = sigma(s_ij) (y_ij^(p-1) (dout_i . v_j - D_i) - h_i / m_i)
    dq_i = m_i sum_j z_ij k_j           dk_j = sum_i ds_ij q_i          dv_j = sum_i y_ij^p dout_i

Shapes: q, out, out_x, dout, dq `[b, s_q, h, d]`; k, v, dk, dv `[b, s_k, h_kv, d]`; total, top,
mean, inverse, gamma, delta, drift, least, offset, share `[b, h, s_q]`; q_idx, q_lo int32 `[s_q]`;
k_idx int32 `[s_k]`.

                   keys, tiles of BLOCK_N        sums, fwd, dq: a program is a row of tiles, grid
                  +-----+-----+-----+-----+                     (query tiles, h, b)
    queries,      |  m  |     |     |     |      dkv:           a program is a column, grid
    tiles of      +-----+-----+-----+-----+                     (key tiles, h_kv, b), loops over
    BLOCK_M       |  =  |  m  |     |     |                     the heads of a group
                  +-----+-----+-----+-----+      rows:          row statistics, no keys
                  |  =  |  =  |  m  |     |
                  +-----+-----+-----+-----+      =  visible: no mask;   m  masked
    LSSAR:        sums: sum and maximum of f;   fwd: mean and inverse of these, then powers

Nothing is added atomically: the same inputs give the same bits.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl

from lcdist_kernels.lssar.inner_loop import dkv_sweep, dq_sweep, power_sweep, sums_sweep
from lcdist_kernels.lssar.rows import FLAT_ULPS
from lcdist_kernels.softmax_steps import (
    key_program,
    load_limits,
    load_range,
    loop_sources,
    query_program,
)
from lcdist_kernels.triton_common import load_tile, store_tile

FLAT = tl.constexpr(FLAT_ULPS * torch.finfo(torch.float32).eps)


@triton.jit
def _share(b_q_idx, b_q_lo, exempt_rows):
    """Return o_i / N_i."""
    b_count = b_q_idx - b_q_lo + 1
    return tl.where(b_count > exempt_rows, 1.0 / tl.maximum(b_count, 1).to(tl.float32), 0.0)


@triton.jit
def _lssar_sums_kernel(
    q, k, total, top,
    q_idx, q_lo, k_idx, ranges,
    seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, PRECISE: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute the sum and the maximum of f of a tile of queries. DESCRIBED: k is a descriptor."""
    i_m, i_h, i_b, i_row = query_program(seqlen_q)
    k, _, at = loop_sources(
        k, k, i_b, i_h // GROUP, 0, 1, stride_kb, stride_ks, stride_kh, stride_kb, stride_ks,
        stride_kh, DESCRIBED,
    )  # fmt: skip
    p_q = q + i_b * stride_qb + i_h * stride_qh
    lo, full_lo, full_hi, hi = load_range(ranges, i_m)

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_q = load_tile(p_q, start, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, True)
    b_sum, b_max = sums_sweep(
        b_q, k, at, lo, full_lo, full_hi, hi, seqlen_k, stride_ks, b_q_idx, b_q_lo, k_idx, HEAD_DIM,
        BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, PRECISE, DESCRIBED,
    )  # fmt: skip
    tl.store(total + i_row + o_m, b_sum, mask=m_m)
    tl.store(top + i_row + o_m, b_max, mask=m_m)


@triton.jit
def _lssar_fwd_kernel(
    q, k, v, mean, inverse, gamma, out, total, out_x, total_x,
    q_idx, q_lo, k_idx, ranges,
    power, exempt_rows, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    TIMES: tl.constexpr, SHARP: tl.constexpr, SLOPE: tl.constexpr, WHOLE: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, PRECISE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute results (WHOLE) or sums of a tile of queries.

    WHOLE: these are all keys of the rows. `total` and `inverse` hold the sum and the maximum of f
    (SHARP), and out, e / gamma, mean and gamma are written. Otherwise mean and inverse are read,
    and A, W, A' and W' written. out and out_x have one layout. DESCRIBED: k and v are descriptors.
    """
    i_m, i_h, i_b, i_row = query_program(seqlen_q)
    k, v, at = loop_sources(
        k, v, i_b, i_h // GROUP, 0, 1, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
        stride_vh, DESCRIBED,
    )  # fmt: skip
    p_q = q + i_b * stride_qb + i_h * stride_qh
    i_out = i_b * stride_ob + i_h * stride_oh
    lo, full_lo, full_hi, hi = load_range(ranges, i_m)

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_q = load_tile(p_q, start, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, True)
    if not WHOLE:
        b_mean = tl.load(mean + i_row + o_m, mask=m_m, other=0.0)
        b_inverse = tl.load(inverse + i_row + o_m, mask=m_m, other=0.0)
    elif SHARP:
        b_max = tl.load(inverse + i_row + o_m, mask=m_m, other=0.0)
        b_mean = tl.load(total + i_row + o_m, mask=m_m, other=0.0)
        b_mean *= _share(b_q_idx, b_q_lo, exempt_rows)
        b_spread = b_max - b_mean
        m_flat = b_spread <= FLAT * b_max
        b_inverse = tl.where(m_flat, 0.0, 1.0 / tl.where(m_flat, 1.0, b_spread))
    else:
        b_mean = tl.zeros([BLOCK_M], tl.float32)
        b_inverse = tl.full([BLOCK_M], 1.0, tl.float32)
    b_out, b_sum, b_out_x, b_sum_x = power_sweep(
        b_q, b_mean * b_inverse, b_inverse, k, v, at, lo, full_lo, full_hi, hi, seqlen_k, stride_ks,
        stride_vs, power, b_q_idx, b_q_lo, k_idx, TIMES, SHARP, SLOPE, HEAD_DIM, BLOCK_D, BLOCK_M,
        BLOCK_N, HAS_LO, PRECISE, DESCRIBED,
    )  # fmt: skip
    if WHOLE:
        m_empty = b_sum == 0
        b_sum = tl.where(m_empty, 1.0, b_sum)
        b_out = b_out / b_sum[:, None]
        b_root = tl.exp2(tl.log2(b_sum) / power)
        tl.store(mean + i_row + o_m, b_mean, mask=m_m)
        tl.store(gamma + i_row + o_m, tl.where(m_empty, 0.0, b_inverse / b_root), mask=m_m)
        if SLOPE:
            b_out_x = (b_out_x - b_sum_x[:, None] * b_out) * (power * b_root / b_sum)[:, None]
    else:
        tl.store(total + i_row + o_m, b_sum, mask=m_m)
        if SLOPE:
            tl.store(total_x + i_row + o_m, b_sum_x, mask=m_m)
    store_tile(out + i_out, b_out, start, seqlen_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D)
    if SLOPE:
        store_tile(out_x + i_out, b_out_x, start, seqlen_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _lssar_rows_kernel(
    dout, out, slope, gamma, delta, drift,
    q_idx, q_lo,
    exempt_rows, seqlen_q,
    stride_dout_b, stride_dout_s, stride_dout_h, stride_ob, stride_os, stride_oh,
    stride_slope_b, stride_slope_s, stride_slope_h,
    SLOPE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute delta and drift of a tile of queries."""
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_row = (i_b * tl.num_programs(1) + i_h) * seqlen_q
    p_dout = dout + i_b * stride_dout_b + i_h * stride_dout_h
    p_out = out + i_b * stride_ob + i_h * stride_oh
    p_slope = slope + i_b * stride_slope_b + i_h * stride_slope_h
    start = tl.program_id(0) * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_dout = load_tile(p_dout, start, seqlen_q, stride_dout_s, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_out = load_tile(p_out, start, seqlen_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_dout = b_dout.to(tl.float32)
    tl.store(delta + i_row + o_m, tl.sum(b_dout * b_out.to(tl.float32), 1), mask=m_m)
    if SLOPE:
        b_slope = load_tile(
            p_slope, start, seqlen_q, stride_slope_s, BLOCK_M, HEAD_DIM, BLOCK_D, False
        )
        b_q_idx = tl.load(q_idx + o_m, mask=m_m, other=0)
        b_q_lo = tl.load(q_lo + o_m, mask=m_m, other=0)
        b_gamma = tl.load(gamma + i_row + o_m, mask=m_m, other=0.0)
        b_h = tl.sum(b_dout * b_slope.to(tl.float32), 1) * b_gamma
        b_drift = b_h * _share(b_q_idx, b_q_lo, exempt_rows)
    else:
        b_drift = tl.zeros([BLOCK_M], tl.float32)
    tl.store(drift + i_row + o_m, b_drift, mask=m_m)


@triton.jit
def _lssar_bwd_dq_kernel(
    q, k, v, dout, mean, gamma, delta, drift, least, offset, share, dq,
    q_idx, q_lo, k_idx, ranges,
    power, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_dout_b, stride_dout_s, stride_dout_h,
    stride_db, stride_ds, stride_dh,
    TIMES: tl.constexpr, SHARP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr,
    PRECISE: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries, and three statistics that the kernel for dk and dv reads.

    These are least = mean gamma, offset = delta gamma and share = drift / p: computed once a row,
    not for every tile of keys. DESCRIBED: k and v are descriptors.
    """
    i_m, i_h, i_b, i_row = query_program(seqlen_q)
    k, v, at = loop_sources(
        k, v, i_b, i_h // GROUP, 0, 1, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
        stride_vh, DESCRIBED,
    )  # fmt: skip
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_dout = dout + i_b * stride_dout_b + i_h * stride_dout_h
    p_dq = dq + i_b * stride_db + i_h * stride_dh
    lo, full_lo, full_hi, hi = load_range(ranges, i_m)

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_q = load_tile(p_q, start, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_dout = load_tile(p_dout, start, seqlen_q, stride_dout_s, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_mean = tl.load(mean + i_row + o_m, mask=m_m, other=0.0)
    b_gamma = tl.load(gamma + i_row + o_m, mask=m_m, other=0.0)
    b_delta = tl.load(delta + i_row + o_m, mask=m_m, other=0.0)
    b_drift = tl.load(drift + i_row + o_m, mask=m_m, other=0.0)
    b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, HAS_LO)
    b_least = b_mean * b_gamma
    tl.store(least + i_row + o_m, b_least, mask=m_m)
    tl.store(offset + i_row + o_m, b_delta * b_gamma, mask=m_m)
    tl.store(share + i_row + o_m, b_drift / power, mask=m_m)
    # A flat row has gamma = 0 and no drift.
    b_scale = b_gamma * power
    b_drift = b_drift / tl.where(b_scale > 0, b_scale, 1.0)
    b_dq = dq_sweep(
        b_q, b_dout, b_least, b_gamma, b_delta, b_drift, k, v, at, lo, full_lo, full_hi, hi,
        seqlen_k, stride_ks, stride_vs, power, b_q_idx, b_q_lo, k_idx, TIMES, SHARP, HEAD_DIM,
        BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, PRECISE, DESCRIBED,
    )  # fmt: skip
    b_dq = b_dq * b_scale[:, None]
    store_tile(p_dq, b_dq, start, seqlen_q, stride_ds, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _lssar_bwd_dkv_kernel(
    q, k, v, dout, least, gamma, offset, share, dk, dv,
    q_idx, q_lo, k_idx, ranges,
    power, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_dout_b, stride_dout_s, stride_dout_h,
    stride_db, stride_ds, stride_dh,
    TIMES: tl.constexpr, SHARP: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr,
    PRECISE: tl.constexpr, EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of a tile of keys from all query heads of the key head.

    DESCRIBED: q and dout are descriptors.
    """
    i_n = tl.program_id(0)
    i_hk, i_b, p_k, p_v = key_program(k, v, stride_kb, stride_kh, stride_vb, stride_vh)
    lo, full_lo, full_hi, hi = load_range(ranges, i_n)

    start = i_n * BLOCK_N
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_tile(p_k, start, seqlen_k, stride_ks, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    b_v = load_tile(p_v, start, seqlen_k, stride_vs, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    b_k_idx = tl.load(k_idx + o_n, mask=o_n < seqlen_k, other=2147483647)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_g in range(0, GROUP):
        i_h = i_hk * GROUP + i_g
        i_row = (i_b * (tl.num_programs(1) * GROUP) + i_h) * seqlen_q
        of_q, of_dout, at = loop_sources(
            q, dout, i_b, i_h, 0, 1, stride_qb, stride_qs, stride_qh, stride_dout_b, stride_dout_s,
            stride_dout_h, DESCRIBED,
        )  # fmt: skip
        b_dk, b_dv = dkv_sweep(
            b_k, b_v, b_dk, b_dv, of_q, of_dout, at, least + i_row, gamma + i_row, offset + i_row,
            share + i_row, lo, full_lo, full_hi, hi, seqlen_q, stride_qs, stride_dout_s, power,
            q_idx, q_lo, b_k_idx, TIMES, SHARP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
            PRECISE, EVEN_M, DESCRIBED,
        )  # fmt: skip
    b_dk = b_dk * power
    i_own = i_b * stride_db + i_hk * stride_dh
    store_tile(dk + i_own, b_dk, start, seqlen_k, stride_ds, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv + i_own, b_dv, start, seqlen_k, stride_ds, BLOCK_N, HEAD_DIM, BLOCK_D)

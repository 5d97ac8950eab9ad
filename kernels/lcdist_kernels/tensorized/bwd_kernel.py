"""The backward of tensorized attention in Triton: a branch's and a hop's gradients in one sweep.

The formulas are in `tensorized.tiled`; who owns what is as in `tensorized.kernel`.
"""
# What a kernel's arguments are, `tl.constexpr` decides, which is no type to Python's checkers.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl

from lcdist_kernels.softmax_steps import nth_masked, ranges_of, seen
from lcdist_kernels.tensorized.kernel import place
from lcdist_kernels.triton_common import LOG2E, dot, load_tile, store_tile


@triton.jit
def _dq_step(
    b_q,
    b_dout,
    b_g,
    b_dq,
    b_dlogits,
    b_lse,
    b_delta,
    b_lam,
    b_gamma,
    p_k,
    p_u,
    i_n,
    size_k,
    step_k,
    step_u,
    qk_scale,
    b_q_idx,
    b_q_lo,
    k_idx,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    BRANCH: tl.constexpr,
    HOP: tl.constexpr,
    MASKED: tl.constexpr,
):
    start = i_n * BLOCK_N
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_tile(p_k, start, size_k, step_k, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_u = load_tile(p_u, start, size_k, step_u, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * qk_scale
    b_ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BRANCH:
        b_p = tl.exp2(b_s - b_lse[:, None])
        if MASKED:
            b_k_idx = tl.load(k_idx + o_n, mask=o_n < size_k, other=2147483647)
            m_s = seen(b_q_idx[:, None], b_q_lo[:, None], b_k_idx[None, :], HAS_LO)
            b_p = tl.where(m_s, b_p, 0.0)
        b_dp = dot(b_dout, tl.trans(b_u), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dlogits += tl.sum(b_ds, 1)
    if HOP:
        b_f = tl.exp2(b_s - b_lam[:, None])
        if MASKED:
            b_f = tl.where((o_n < size_k)[None, :], b_f, 0.0)
        b_dp = dot(b_g, tl.trans(b_u), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_ds += b_f * (b_dp - b_gamma[:, None])
    return dot(b_ds.to(b_k.dtype), b_k, b_dq), b_dlogits


@triton.jit
def _dq_all(
    b_q,
    b_dout,
    b_g,
    b_dq,
    b_dlogits,
    b_lse,
    b_delta,
    b_lam,
    b_gamma,
    p_k,
    p_u,
    first,
    size_k,
    step_k,
    step_u,
    qk_scale,
    k_idx,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BRANCH: tl.constexpr,
    HOP: tl.constexpr,
):
    """Key tiles from the first on, all seen by all queries."""
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    whole = tl.maximum(size_k // BLOCK_N, first)
    for i in range(0, whole - first):
        b_dq, b_dlogits = _dq_step(
            b_q, b_dout, b_g, b_dq, b_dlogits, b_lse, b_delta, b_lam, b_gamma, p_k, p_u,
            first + i, size_k, step_k, step_u, qk_scale, b_all, b_all, k_idx, HEAD_DIM, BLOCK_D,
            BLOCK_M, BLOCK_N, False, BRANCH, HOP, False,
        )  # fmt: skip
    for i in range(0, tl.cdiv(size_k, BLOCK_N) - whole):
        b_dq, b_dlogits = _dq_step(
            b_q, b_dout, b_g, b_dq, b_dlogits, b_lse, b_delta, b_lam, b_gamma, p_k, p_u,
            whole + i, size_k, step_k, step_u, qk_scale, b_all, b_all, k_idx, HEAD_DIM, BLOCK_D,
            BLOCK_M, BLOCK_N, False, BRANCH, HOP, True,
        )  # fmt: skip
    return b_dq, b_dlogits


@triton.jit
def _tensorized_bwd_dq_kernel(
    q,
    k,
    u,
    dout,
    g,
    lse,
    delta,
    lam,
    gamma,
    dq,
    dlogits,
    q_idx,
    q_lo,
    k_idx,
    ranges,
    before,
    softmax_scale,
    size_q,
    size_k,
    stride,
    outers,
    nheads,
    seqlen,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_ub,
    stride_us,
    stride_uh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_db,
    stride_ds,
    stride_dh,
    GROUP_K: tl.constexpr,
    GROUP_U: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    BRANCH: tl.constexpr,
    HOP: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """lse, delta: of the whole row less the branch's bias; lam, gamma: of the hop; g: dU."""
    tiles = tl.cdiv(size_q, BLOCK_M)
    i_m, i_h, i_r, i_o = place(tiles, stride, nheads)
    i_m = tiles - 1 - i_m
    i_b, i_o = i_o // outers, i_o % outers
    row_q = i_o * size_q * stride + i_r
    row_k = i_o * size_k * stride + i_r
    i_row = (i_b * nheads + i_h) * seqlen + row_q
    p_q = q + i_b * stride_qb + i_h * stride_qh + row_q * stride_qs
    p_k = k + i_b * stride_kb + (i_h // GROUP_K) * stride_kh + row_k * stride_ks
    p_u = u + i_b * stride_ub + (i_h // GROUP_U) * stride_uh + row_k * stride_us
    wide = tl.cast(stride, tl.int64)
    step_q, step_k, step_u = stride_qs * wide, stride_ks * wide, stride_us * wide

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < size_q
    o_row = i_row + o_m.to(tl.int64) * stride
    b_q = load_tile(p_q, start, size_q, step_q, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dlogits = tl.zeros([BLOCK_M], tl.float32)
    # What a launch has no use for is never read: any tile of the right shape stands for it.
    b_dout, b_g = b_q, b_q
    b_lse, b_delta, b_lam, b_gamma = b_dlogits, b_dlogits, b_dlogits, b_dlogits
    if HOP:
        p_g = g + i_b * stride_gb + i_h * stride_gh + row_q * stride_gs
        b_g = load_tile(p_g, start, size_q, stride_gs * wide, BLOCK_M, HEAD_DIM, BLOCK_D, False)
        b_lam = tl.load(lam + o_row, mask=m_m, other=float("inf")) * LOG2E
        b_gamma = tl.load(gamma + o_row, mask=m_m, other=0.0)
    qk_scale = softmax_scale * LOG2E
    hop_from = 0
    if BRANCH:
        p_dout = dout + i_b * stride_ob + i_h * stride_oh + row_q * stride_os
        step_o = stride_os * wide
        b_dout = load_tile(p_dout, start, size_q, step_o, BLOCK_M, HEAD_DIM, BLOCK_D, False)
        # A row that is not there has weights exp(-inf) = 0, masked or not.
        b_lse = tl.load(lse + o_row, mask=m_m, other=float("inf")) * LOG2E
        b_delta = tl.load(delta + o_row, mask=m_m, other=0.0)
        b_q_idx = tl.load(q_idx + o_m, mask=m_m, other=-2147483648)
        b_q_lo = tl.load(q_lo + o_m, mask=m_m, other=0) if HAS_LO else b_q_idx
        first, full_lo, full_hi, stop = ranges_of(ranges, i_m)
        for i in range(0, full_hi - full_lo):
            b_dq, b_dlogits = _dq_step(
                b_q, b_dout, b_g, b_dq, b_dlogits, b_lse, b_delta, b_lam, b_gamma, p_k, p_u,
                full_lo + i, size_k, step_k, step_u, qk_scale, b_q_idx, b_q_lo, k_idx,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, True, HOP, False,
            )  # fmt: skip
        for i in range(0, (full_lo - first) + (stop - full_hi)):
            i_n = nth_masked(i, first, full_lo, full_hi)
            b_dq, b_dlogits = _dq_step(
                b_q, b_dout, b_g, b_dq, b_dlogits, b_lse, b_delta, b_lam, b_gamma, p_k, p_u,
                i_n, size_k, step_k, step_u, qk_scale, b_q_idx, b_q_lo, k_idx,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, True, HOP, True,
            )  # fmt: skip
        hop_from = tl.maximum(stop, full_hi)
        if BEFORE:
            rows_before = tl.load(before + i_o) * size_k
            b_dq, b_dlogits = _dq_all(
                b_q, b_dout, b_g, b_dq, b_dlogits, b_lse, b_delta, b_lam, b_gamma,
                p_k - rows_before * step_k, p_u - rows_before * step_u, 0, rows_before, step_k,
                step_u, qk_scale, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, False,
            )  # fmt: skip
        tl.store(dlogits + o_row, b_dlogits, mask=m_m)
    if HOP:
        b_dq, b_dlogits = _dq_all(
            b_q, b_dout, b_g, b_dq, b_dlogits, b_lse, b_delta, b_lam, b_gamma, p_k, p_u, hop_from,
            size_k, step_k, step_u, qk_scale, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
            True,
        )  # fmt: skip
    p_dq = dq + i_b * stride_db + i_h * stride_dh + row_q * stride_ds
    b_dq = b_dq * softmax_scale
    store_tile(p_dq, b_dq, start, size_q, stride_ds * wide, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkv_step(
    b_k,
    b_u,
    b_dk,
    b_du,
    p_q,
    p_dout,
    p_g,
    p_lse,
    p_delta,
    p_lam,
    p_gamma,
    i_m,
    size_q,
    stride,
    step_q,
    step_o,
    step_g,
    qk_scale,
    q_idx,
    q_lo,
    b_k_idx,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    EVEN_M: tl.constexpr,
    BRANCH: tl.constexpr,
    HOP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Scores stand transposed, `[BLOCK_N, BLOCK_M]`: they are a product's left side as they are."""
    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < size_q
    o_row = o_m.to(tl.int64) * stride
    b_q = load_tile(p_q, start, size_q, step_q, BLOCK_M, HEAD_DIM, BLOCK_D, EVEN_M)
    b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32)) * qk_scale
    b_ds = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if BRANCH:
        b_dout = load_tile(p_dout, start, size_q, step_o, BLOCK_M, HEAD_DIM, BLOCK_D, EVEN_M)
        b_lse = tl.load(p_lse + o_row, mask=m_m, other=float("inf")) * LOG2E
        b_delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)
        b_p = tl.exp2(b_s - b_lse[None, :])
        if MASKED:
            b_q_idx = tl.load(q_idx + o_m, mask=m_m, other=-2147483648)
            b_q_lo = tl.load(q_lo + o_m, mask=m_m, other=0) if HAS_LO else b_q_idx
            m_s = seen(b_q_idx[None, :], b_q_lo[None, :], b_k_idx[:, None], HAS_LO)
            b_p = tl.where(m_s, b_p, 0.0)
        b_du = dot(b_p.to(b_dout.dtype), b_dout, b_du)
        b_dp = dot(b_u, tl.trans(b_dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        b_ds = b_p * (b_dp - b_delta[None, :])
    if HOP:
        b_g = load_tile(p_g, start, size_q, step_g, BLOCK_M, HEAD_DIM, BLOCK_D, EVEN_M)
        b_lam = tl.load(p_lam + o_row, mask=m_m, other=float("inf")) * LOG2E
        b_gamma = tl.load(p_gamma + o_row, mask=m_m, other=0.0)
        b_f = tl.exp2(b_s - b_lam[None, :])
        b_du = dot(b_f.to(b_g.dtype), b_g, b_du)
        b_dp = dot(b_u, tl.trans(b_g), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        b_ds += b_f * (b_dp - b_gamma[None, :])
    b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_du


@triton.jit
def _dkv_branch(
    b_k,
    b_u,
    b_dk,
    b_du,
    p_q,
    p_dout,
    p_g,
    p_lse,
    p_delta,
    p_lam,
    p_gamma,
    run,
    rows_after,
    size_q,
    stride,
    step_q,
    step_o,
    step_g,
    qk_scale,
    q_idx,
    q_lo,
    b_k_idx,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    EVEN_M: tl.constexpr,
    HOP: tl.constexpr,
    AFTER: tl.constexpr,
):
    """All queries whose branch sees any of the keys, those of later blocks last."""
    first, full_lo, full_hi, stop = run
    for i in range(0, full_hi - full_lo):
        b_dk, b_du = _dkv_step(
            b_k, b_u, b_dk, b_du, p_q, p_dout, p_g, p_lse, p_delta, p_lam, p_gamma,
            full_lo + i, size_q, stride, step_q, step_o, step_g, qk_scale, q_idx, q_lo,
            b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, True, HOP, False,
        )  # fmt: skip
    for i in range(0, (full_lo - first) + (stop - full_hi)):
        i_m = nth_masked(i, first, full_lo, full_hi)
        b_dk, b_du = _dkv_step(
            b_k, b_u, b_dk, b_du, p_q, p_dout, p_g, p_lse, p_delta, p_lam, p_gamma,
            i_m, size_q, stride, step_q, step_o, step_g, qk_scale, q_idx, q_lo,
            b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, True, HOP, True,
        )  # fmt: skip
    if AFTER:
        skipped = tl.cast(size_q, tl.int64)
        p_q += skipped * step_q
        p_dout += skipped * step_o
        for i in range(0, tl.cdiv(rows_after, BLOCK_M)):
            b_dk, b_du = _dkv_step(
                b_k, b_u, b_dk, b_du, p_q, p_dout, p_g, p_lse + skipped, p_delta + skipped, p_lam,
                p_gamma, i, rows_after, stride, step_q, step_o, step_g, qk_scale, q_idx, q_lo,
                b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, False, True, False, False,
            )  # fmt: skip
    return b_dk, b_du


@triton.jit
def _tensorized_bwd_dkv_kernel(
    q,
    k,
    u,
    dout,
    g,
    lse,
    delta,
    lam,
    gamma,
    dk,
    du,
    q_idx,
    q_lo,
    k_idx,
    ranges,
    after,
    softmax_scale,
    size_q,
    size_k,
    stride,
    outers,
    nheads,
    seqlen,
    stride_qb,
    stride_qs,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_ub,
    stride_us,
    stride_uh,
    stride_ob,
    stride_os,
    stride_oh,
    stride_gb,
    stride_gs,
    stride_gh,
    stride_db,
    stride_ds,
    stride_dh,
    stride_eb,
    stride_es,
    stride_eh,
    GROUP_K: tl.constexpr,
    GROUP_U: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
    EVEN_M: tl.constexpr,
    BRANCH: tl.constexpr,
    HOP: tl.constexpr,
    AFTER: tl.constexpr,
):
    """All query heads of a key head in one program; nheads: of keys.

    after (AFTER): how many blocks after its own have branches that see the whole of each block.
    GROUP_U is 1, and a query head has a U of its own, or GROUP_K.
    """
    tiles = tl.cdiv(size_k, BLOCK_N)
    i_n, i_hk, i_r, i_o = place(tiles, stride, nheads)
    i_b, i_o = i_o // outers, i_o % outers
    row_q = i_o * size_q * stride + i_r
    row_k = i_o * size_k * stride + i_r
    i_hu = i_hk * (GROUP_K // GROUP_U)
    p_k = k + i_b * stride_kb + i_hk * stride_kh + row_k * stride_ks
    p_u = u + i_b * stride_ub + i_hu * stride_uh + row_k * stride_us
    p_du = du + i_b * stride_eb + i_hu * stride_eh + row_k * stride_es
    wide = tl.cast(stride, tl.int64)
    step_q, step_o, step_g = stride_qs * wide, stride_os * wide, stride_gs * wide
    step_u, step_e = stride_us * wide, stride_es * wide

    start = i_n * BLOCK_N
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_tile(p_k, start, size_k, stride_ks * wide, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    b_u = load_tile(p_u, start, size_k, step_u, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    b_k_idx = o_n
    query_tiles = tl.cdiv(size_q, BLOCK_M)
    first, stop = query_tiles, query_tiles
    rows_after = 0
    if BRANCH:
        b_k_idx = tl.load(k_idx + o_n, mask=o_n < size_k, other=2147483647)
        run = ranges_of(ranges, i_n)
        first, _, _, stop = run
        if AFTER:
            rows_after = tl.load(after + i_o) * size_q
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_du = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2E
    for i_g in range(0, GROUP_K):
        i_h = i_hk * GROUP_K + i_g
        i_row = (i_b * (nheads * GROUP_K) + i_h) * seqlen + row_q
        p_q = q + i_b * stride_qb + i_h * stride_qh + row_q * stride_qs
        p_dout = dout + i_b * stride_ob + i_h * stride_oh + row_q * stride_os
        p_g = g + i_b * stride_gb + i_h * stride_gh + row_q * stride_gs
        p_lse, p_delta, p_lam, p_gamma = lse + i_row, delta + i_row, lam + i_row, gamma + i_row
        if GROUP_U == 1 and GROUP_K > 1:
            b_u = load_tile(p_u, start, size_k, step_u, BLOCK_N, HEAD_DIM, BLOCK_D, False)
            b_du = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if BRANCH:
            b_dk, b_du = _dkv_branch(
                b_k, b_u, b_dk, b_du, p_q, p_dout, p_g, p_lse, p_delta, p_lam, p_gamma, run,
                rows_after, size_q, stride, step_q, step_o, step_g, qk_scale, q_idx, q_lo, b_k_idx,
                HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, HOP, AFTER,
            )  # fmt: skip
        if HOP:
            # Queries whose branch sees nothing of this tile: those before it, and, where the
            # last ones do not, those after it.
            for i in range(0, first + (query_tiles - stop)):
                i_m = tl.where(i < first, i, stop + i - first)
                b_dk, b_du = _dkv_step(
                    b_k, b_u, b_dk, b_du, p_q, p_dout, p_g, p_lse, p_delta, p_lam, p_gamma,
                    i_m, size_q, stride, step_q, step_o, step_g, qk_scale, q_idx,
                    q_lo, b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, False,
                    True, False,
                )  # fmt: skip
        if GROUP_U == 1:
            store_tile(p_du, b_du, start, size_k, step_e, BLOCK_N, HEAD_DIM, BLOCK_D)
            p_u += stride_uh
            p_du += stride_eh
    if GROUP_U > 1:
        store_tile(p_du, b_du, start, size_k, step_e, BLOCK_N, HEAD_DIM, BLOCK_D)
    p_dk = dk + i_b * stride_db + i_hk * stride_dh + row_k * stride_ds
    b_dk = b_dk * softmax_scale
    store_tile(p_dk, b_dk, start, size_k, stride_ds * wide, BLOCK_N, HEAD_DIM, BLOCK_D)

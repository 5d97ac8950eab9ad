"""Full causal attention in Triton: the kernels of every ring whose scores are q.k.

With s_ij = softmax_scale q_i . k_j over the keys with lo_i <= j <= i (FlashAttention-2,
arXiv:2307.08691):

    out_i = sum_j p_ij v_j,  p_ij = exp(s_ij - lse_i)     delta_i = sum_d dout_i out_i
    dv_j = sum_i p_ij dout_i            ds_ij = p_ij (dout_i . v_j - delta_i)
    dq_i = softmax_scale sum_j ds_ij k_j        dk_j = softmax_scale sum_i ds_ij q_i

Shapes: q, out, dout, dq `[b, s_q, h, d]`; k, v, dk, dv `[b, s_k, h_kv, d]`; lse, lse2 = lse
log2(e), delta `[b, h, s_q]`; q_idx, q_lo int32 `[s_q]`; k_idx int32 `[s_k]`; ranges int32 `[tiles,
4]`.

                     keys, tiles of BLOCK_N              fwd, dq: one program is a row of tiles,
                 +-----+-----+-----+-----+-----+                  grid (query tiles, h, b)
    queries,     |  m  |     |     |     |     |         dkv:     one program is a column of tiles,
    tiles of     +-----+-----+-----+-----+-----+                  grid (key tiles, h_kv, b), and
    BLOCK_M      |  =  |  m  |     |     |     |                  loops over the heads of a group
                 +-----+-----+-----+-----+-----+
                 |     |  m  |  m  |     |     |         =  all visible: no mask
                 +-----+-----+-----+-----+-----+         m  partly visible: masked
                 |     |  m  |  =  |  m  |     |            hidden: skipped (a later token, or
                 +-----+-----+-----+-----+-----+            another document's)

Nothing is added atomically: the same inputs give the same bits. Scores are scaled by log2 e and
exponentials are base 2.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.common import check_qkv
from lcdist_kernels.descriptors import make_descriptors, use_descriptors
from lcdist_kernels.full.tile_configs import (
    BWD_DKV,
    BWD_DKV_HOPPER,
    BWD_DQ,
    BWD_DQ_HOPPER,
    FWD,
    FWD_HOPPER,
)
from lcdist_kernels.softmax_steps import (
    dq_loop,
    finish_softmax,
    fwd_loop,
    is_visible,
    key_program,
    load_limits,
    load_lse,
    load_query_tile,
    load_range,
    loop_sources,
    part_of,
    query_program,
    store_delta,
)
from lcdist_kernels.tile_ranges import (
    band_of,
    bounded_below,
    device_stream,
    key_tables,
    query_tables,
)
from lcdist_kernels.triton_common import (
    LOG2E,
    Launch,
    check_kernel,
    choose_launch,
    dot,
    head_constants,
    last_dim_contiguous,
    launch_context,
    load_tile,
    store_tile,
    strides,
    take_inputs,
)


@triton.jit
def _full_fwd_kernel(
    q, k, v, out, lse,
    q_idx, q_lo, k_idx, ranges,
    qk_scale, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute out and lse of a tile of queries. DESCRIBED: k and v are descriptors."""
    i_m, i_h, i_b, i_row = query_program(seqlen_q)
    k, v, at = loop_sources(
        k, v, i_b, i_h // GROUP, 0, 1, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
        stride_vh, DESCRIBED,
    )  # fmt: skip
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_out = out + i_b * stride_ob + i_h * stride_oh
    lo, full_lo, full_hi, hi = load_range(ranges, i_m)

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_q = load_tile(p_q, start, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, HAS_LO)
    b_out, b_max, b_sum = fwd_loop(
        b_q, k, v, at, lo, full_lo, full_hi, hi, seqlen_k, stride_ks, stride_vs, qk_scale, b_q_idx,
        b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, DESCRIBED,
    )  # fmt: skip
    b_out, b_lse = finish_softmax(b_out, b_max, b_sum)
    tl.store(lse + i_row + o_m, b_lse, mask=m_m)
    store_tile(p_out, b_out, start, seqlen_q, stride_os, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _full_bwd_dq_kernel(
    q, k, v, out, dout, lse, delta, lse2, dq,
    q_idx, q_lo, k_idx, ranges,
    softmax_scale, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_ob, stride_os, stride_oh,
    stride_dout_b, stride_dout_s, stride_dout_h, stride_db, stride_ds, stride_dh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, ADD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries, and delta and lse2, which the kernel for dk and dv reads.

    ADD: to what dq holds. DESCRIBED: k and v are descriptors.
    """
    i_m, i_h, i_b, i_row = query_program(seqlen_q)
    k, v, at = loop_sources(
        k, v, i_b, i_h // GROUP, 0, 1, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs,
        stride_vh, DESCRIBED,
    )  # fmt: skip
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_out = out + i_b * stride_ob + i_h * stride_oh
    p_dout = dout + i_b * stride_dout_b + i_h * stride_dout_h
    p_dq = dq + i_b * stride_db + i_h * stride_dh
    lo, full_lo, full_hi, hi = load_range(ranges, i_m)

    start = i_m * BLOCK_M
    o_m = start + tl.arange(0, BLOCK_M)
    m_m = o_m < seqlen_q
    b_dout, b_delta = store_delta(
        p_out, p_dout, delta + i_row, start, seqlen_q, stride_os, stride_dout_s, HEAD_DIM, BLOCK_D,
        BLOCK_M,
    )  # fmt: skip
    b_q = load_tile(p_q, start, seqlen_q, stride_qs, BLOCK_M, HEAD_DIM, BLOCK_D, False)
    b_lse = load_lse(lse + i_row, lse2 + i_row, o_m, m_m)
    b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, HAS_LO)
    b_dq, _ = dq_loop(
        b_q, b_dout, b_lse, b_delta, k, v, at, lo, full_lo, full_hi, hi, seqlen_k, stride_ks,
        stride_vs, softmax_scale * LOG2E, b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M,
        BLOCK_N, HAS_LO, DESCRIBED, False,
    )  # fmt: skip
    b_dq = b_dq * softmax_scale
    if ADD:
        b_sum = load_tile(p_dq, start, seqlen_q, stride_ds, BLOCK_M, HEAD_DIM, BLOCK_D, False)
        b_dq += b_sum.to(tl.float32)
    store_tile(p_dq, b_dq, start, seqlen_q, stride_ds, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkv_step(
    b_k, b_v, b_dk, b_dv, q, dout, at, p_lse, p_delta, i_m, masked, seqlen_q, stride_qs,
    stride_dout_s, qk_scale, q_idx, q_lo, b_k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) of a tile of keys after tile i_m of queries; dk without softmax_scale.

    Scores are transposed, `[BLOCK_N, BLOCK_M]`, so they are the left operand of a product as they
    are. q, dout, at: as `loop_sources` returns them. masked: whether a query may not see a key.
    """
    start = i_m * BLOCK_M
    b_q, b_dout, b_lse, b_delta = load_query_tile(
        q, dout, at, p_lse, p_delta, start, seqlen_q, stride_qs, stride_dout_s, HEAD_DIM, BLOCK_D,
        BLOCK_M, EVEN_M, DESCRIBED,
    )  # fmt: skip
    # Both products go before the exponentials, which then run beside the second.
    b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    b_dp = dot(b_v, tl.trans(b_dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    b_p = tl.exp2(b_s * qk_scale - b_lse[None, :])
    if masked:
        o_m = start + tl.arange(0, BLOCK_M)
        b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, o_m < seqlen_q, HAS_LO)
        m_s = is_visible(b_q_idx[None, :], b_q_lo[None, :], b_k_idx[:, None], HAS_LO)
        b_p = tl.where(m_s, b_p, 0.0)
    b_dv = dot(b_p.to(b_dout.dtype), b_dout, b_dv)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_dv


@triton.jit
def dkv_loop(
    b_k, b_v, b_dk, b_dv, q, dout, at, p_lse, p_delta, lo, full_lo, full_hi, hi, seqlen_q,
    stride_qs, stride_dout_s, qk_scale, q_idx, q_lo, b_k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) after tiles lo to hi of queries of one head, as `_dkv_step`.

    Tiles in [full_lo, full_hi) need no mask.
    """
    if DESCRIBED:
        for i in range(lo, hi):
            b_dk, b_dv = _dkv_step(
                b_k, b_v, b_dk, b_dv, q, dout, at, p_lse, p_delta, i,
                (i < full_lo) | (i >= full_hi), seqlen_q, stride_qs, stride_dout_s, qk_scale, q_idx,
                q_lo, b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, True,
            )  # fmt: skip
    else:
        for part in tl.static_range(3):
            first, stop = part_of(lo, full_lo, full_hi, hi, part)
            for i in range(first, stop):
                b_dk, b_dv = _dkv_step(
                    b_k, b_v, b_dk, b_dv, q, dout, at, p_lse, p_delta, i, part != 1, seqlen_q,
                    stride_qs, stride_dout_s, qk_scale, q_idx, q_lo, b_k_idx, HEAD_DIM, BLOCK_D,
                    BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, False,
                )  # fmt: skip
    return b_dk, b_dv


@triton.jit
def _full_bwd_dkv_kernel(
    q, k, v, dout, lse2, delta, dk, dv,
    q_idx, q_lo, k_idx, ranges,
    softmax_scale, seqlen_q, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh, stride_dout_b, stride_dout_s, stride_dout_h,
    stride_db, stride_ds, stride_dh,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr, EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
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
    qk_scale = softmax_scale * LOG2E
    for i_g in range(0, GROUP):
        i_h = i_hk * GROUP + i_g
        i_row = (i_b * (tl.num_programs(1) * GROUP) + i_h) * seqlen_q
        of_q, of_dout, at = loop_sources(
            q, dout, i_b, i_h, 0, 1, stride_qb, stride_qs, stride_qh, stride_dout_b, stride_dout_s,
            stride_dout_h, DESCRIBED,
        )  # fmt: skip
        b_dk, b_dv = dkv_loop(
            b_k, b_v, b_dk, b_dv, of_q, of_dout, at, lse2 + i_row, delta + i_row, lo, full_lo,
            full_hi, hi, seqlen_q, stride_qs, stride_dout_s, qk_scale, q_idx, q_lo, b_k_idx,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, DESCRIBED,
        )  # fmt: skip
    i_own = i_b * stride_db + i_hk * stride_dh
    b_dk = b_dk * softmax_scale
    store_tile(dk + i_own, b_dk, start, seqlen_k, stride_ds, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_tile(dv + i_own, b_dv, start, seqlen_k, stride_ds, BLOCK_N, HEAD_DIM, BLOCK_D)


def full_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, q_lo: Tensor, k_idx: Tensor,
    softmax_scale: float, *,
    out_dtype: torch.dtype | None = None, out: Tensor | None = None, launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the partial (out `[b, s_q, h, d]`, lse `[b, h, s_q]`) of q over a block of keys.

    Like the tiled `full_fwd`, for bf16, fp16 and fp32, head_dim even and from 16 to 256.

    Args:
        out_dtype: of out, default fp32; lse is fp32.
        out: tensor to write to, its last dimension contiguous.
        launch: tiles other than those of the table.

    Raises:
        ValueError: as `check_kernel`.
    """
    q, k, v, softmax_scale = take_inputs(q, k, v, softmax_scale)
    batch, seqlen, nheads, _ = q.shape
    if out is None:
        out = torch.empty(q.shape, dtype=out_dtype or torch.float32, device=q.device)
    assert out.shape == q.shape and out.stride(3) == 1
    lse = torch.empty((batch, nheads, seqlen), dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    launch, described = launch or choose_launch(FWD, q, FWD_HOPPER), use_descriptors(k, v)
    keys = make_descriptors(launch.block_n, k, v) if described else (k, v)
    band, place = band_of(q_idx, q_lo, k_idx), device_stream(q)
    grid = (triton.cdiv(seqlen, launch.block_m), nheads, batch)
    with launch_context(q):
        _full_fwd_kernel[grid](
            q, *keys, out, lse, *query_tables(band, launch.block_m, launch.block_n, place),
            softmax_scale * LOG2E.value, seqlen, k.shape[1], *strides(q, k, v, out),
            **head_constants(q, k), HAS_LO=bounded_below(band), DESCRIBED=described,
            **launch.options(),
        )  # fmt: skip
    return out, lse


def full_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_idx: Tensor,
    q_lo: Tensor, k_idx: Tensor, softmax_scale: float, *,
    grad_dtype: torch.dtype | None = None, dq_sum: Tensor | None = None,
    launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of (dq, dk, dv) that passes through this block of keys.

    Like the tiled `full_bwd`: out and lse are over all keys that the queries see.

    Args:
        grad_dtype: of the gradients, default fp32.
        dq_sum: as in the tiled `full_bwd`; the kernel adds, its last dimension is contiguous.
        launches: tiles for dq and for dk, dv, other than those of the tables.

    Raises:
        ValueError: as `check_kernel`.
    """
    check_qkv(q, k, v)
    check_kernel(q)
    q, k, v, out, dout = (last_dim_contiguous(x) for x in (q, k, v, out, dout.to(q.dtype)))
    batch, seqlen, nheads, _ = q.shape
    grads = {"dtype": grad_dtype or torch.float32, "device": q.device}
    dq = torch.empty(q.shape, **grads) if dq_sum is None else dq_sum
    assert dq.shape == q.shape and dq.stride(3) == 1
    dk, dv = (torch.empty(x.shape, **grads) for x in (k, v))
    if not q.numel() or not k.numel():
        return dq.zero_() if dq_sum is None else dq, dk.zero_(), dv.zero_()
    by_keys, by_rows = use_descriptors(k, v), use_descriptors(q, dout)
    for_dq, for_dkv = launches or (
        choose_launch(BWD_DQ, q, BWD_DQ_HOPPER if by_keys else None),
        choose_launch(BWD_DKV, q, BWD_DKV_HOPPER if by_rows else None),
    )
    keys = make_descriptors(for_dq.block_n, k, v) if by_keys else (k, v)
    rows = make_descriptors(for_dkv.block_m, q, dout) if by_rows else (q, dout)
    band, place = band_of(q_idx, q_lo, k_idx), device_stream(q)
    lse = lse.contiguous()
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    inputs = strides(q, k, v)
    sizes = head_constants(q, k) | {"HAS_LO": bounded_below(band)}
    with launch_context(q):
        _full_bwd_dq_kernel[(triton.cdiv(seqlen, for_dq.block_m), nheads, batch)](
            q, *keys, out, dout, lse, delta, lse2, dq,
            *query_tables(band, for_dq.block_m, for_dq.block_n, place), float(softmax_scale),
            seqlen, k.shape[1], *inputs, *strides(out, dout, dq), **sizes,
            ADD=dq_sum is not None, DESCRIBED=by_keys, **for_dq.options(),
        )  # fmt: skip
        _full_bwd_dkv_kernel[(triton.cdiv(k.shape[1], for_dkv.block_n), k.shape[2], batch)](
            rows[0], k, v, rows[1], lse2, delta, dk, dv,
            *key_tables(band, for_dkv.block_m, for_dkv.block_n, place), float(softmax_scale),
            seqlen, k.shape[1], *inputs, *strides(dout, dk), **sizes,
            EVEN_M=seqlen % for_dkv.block_m == 0, DESCRIBED=by_rows, **for_dkv.options(),
        )  # fmt: skip
    return dq, dk, dv

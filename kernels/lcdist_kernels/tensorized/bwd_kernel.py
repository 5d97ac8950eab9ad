"""Backward of tensorized attention in Triton: gradients of a branch and a hop of a mode.

The formulas are in `tensorized.tiled`; tiles, fibres and grid are as in `tensorized.kernel`.

Shapes: dout, du_next, dq like q; dk like k; du like u; lse, delta, hop_lse, hop_delta, dlogits `[b,
h, s]`.

    dq:   a program is a row of tiles of one fibre and query head
    dkv:  a program is a column of tiles of one fibre and key head; it loops over the query heads

                 keys
             +-----+-----+-----+       dq visits, per row:     branch tiles (with the hop), blocks
    queries  |  f  |  h  |  h  |                               before, then the hop's other tiles
             +-----+-----+-----+       dkv visits, per column: branch tiles, blocks after, and
             |  =  |  f  |  h  |                               then all tiles again, for the hop
             +-----+-----+-----+
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl

from lcdist_kernels.softmax_steps import (
    dq_loop,
    is_visible,
    load_key_numbers,
    load_limits,
    load_pair,
    load_range,
    nth_masked,
)
from lcdist_kernels.tensorized.kernel import (
    fibre_sources,
    head_rows,
    load_queries,
    load_queries_of,
    program_coords,
    rotate_tile,
    store_queries_of,
    tile_rows,
)
from lcdist_kernels.triton_common import LOG2E, dot, load_tile, store_tile


@triton.jit
def _dq_step(
    b_q, b_dout, b_du_next, b_dq, b_dlogits, b_lse, b_delta, b_hop_lse, b_hop_delta, p_k, p_u, i_n,
    size_k, step_k, step_u, qk_scale, b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, BRANCH: tl.constexpr, HOP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return (dq, dlogits) after one more tile of keys; dq without softmax_scale.

    BRANCH, HOP: parts that the tile belongs to.
    """
    start = i_n * BLOCK_N
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_tile(p_k, start, size_k, step_k, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_u = load_tile(p_u, start, size_k, step_u, BLOCK_N, HEAD_DIM, BLOCK_D, not MASKED)
    b_s = dot(b_q, tl.trans(b_k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    b_ds = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BRANCH:
        b_p = tl.exp2(b_s * qk_scale - b_lse[:, None])
        if MASKED:
            b_k_idx = load_key_numbers(k_idx, o_n, size_k)
            m_s = is_visible(b_q_idx[:, None], b_q_lo[:, None], b_k_idx[None, :], HAS_LO)
            b_p = tl.where(m_s, b_p, 0.0)
        b_dp = dot(b_dout, tl.trans(b_u), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dlogits += tl.sum(b_ds, 1)
    if HOP:
        b_hop_p = tl.exp2(b_s * qk_scale - b_hop_lse[:, None])
        if MASKED:
            b_hop_p = tl.where((o_n < size_k)[None, :], b_hop_p, 0.0)
        b_dp = dot(b_du_next, tl.trans(b_u), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        b_ds += b_hop_p * (b_dp - b_hop_delta[:, None])
    return dot(b_ds.to(b_k.dtype), b_k, b_dq), b_dlogits


@triton.jit
def _dq_all(
    b_q, b_dout, b_du_next, b_dq, b_dlogits, b_lse, b_delta, b_hop_lse, b_hop_delta, p_k, p_u, lo,
    size_k, step_k, step_u, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BRANCH: tl.constexpr, HOP: tl.constexpr,
):  # fmt: skip
    """Return (dq, dlogits) after all key tiles from `lo` on, visible to all queries."""
    b_all = tl.full([BLOCK_M], 2147483646, tl.int32)
    whole = tl.maximum(size_k // BLOCK_N, lo)
    for i in range(0, whole - lo):
        b_dq, b_dlogits = _dq_step(
            b_q, b_dout, b_du_next, b_dq, b_dlogits, b_lse, b_delta, b_hop_lse, b_hop_delta, p_k,
            p_u, lo + i, size_k, step_k, step_u, qk_scale, b_all, b_all, None, HEAD_DIM, BLOCK_D,
            BLOCK_M, BLOCK_N, False, BRANCH, HOP, False,
        )  # fmt: skip
    for i in range(0, tl.cdiv(size_k, BLOCK_N) - whole):
        b_dq, b_dlogits = _dq_step(
            b_q, b_dout, b_du_next, b_dq, b_dlogits, b_lse, b_delta, b_hop_lse, b_hop_delta, p_k,
            p_u, whole + i, size_k, step_k, step_u, qk_scale, b_all, b_all, None, HEAD_DIM,
            BLOCK_D, BLOCK_M, BLOCK_N, False, BRANCH, HOP, True,
        )  # fmt: skip
    return b_dq, b_dlogits


@triton.jit
def _fork_dq(
    b_q, b_dout, b_du_next, b_lse, b_delta, b_hop_lse, b_hop_delta, p_k, p_u, lo, full_lo, full_hi,
    hi, before, i_o, size_k, step_k, step_u, qk_scale, b_q_idx, b_q_lo, k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr,
):  # fmt: skip
    """Return dq of branch and hop, without softmax_scale, and dlogits of the branch."""
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dlogits = tl.zeros([BLOCK_M], tl.float32)
    for i in range(0, full_hi - full_lo):
        b_dq, b_dlogits = _dq_step(
            b_q, b_dout, b_du_next, b_dq, b_dlogits, b_lse, b_delta, b_hop_lse, b_hop_delta, p_k,
            p_u, full_lo + i, size_k, step_k, step_u, qk_scale, b_q_idx, b_q_lo, k_idx, HEAD_DIM,
            BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, True, True, False,
        )  # fmt: skip
    for i in range(0, (full_lo - lo) + (hi - full_hi)):
        i_n = nth_masked(i, lo, full_lo, full_hi)
        b_dq, b_dlogits = _dq_step(
            b_q, b_dout, b_du_next, b_dq, b_dlogits, b_lse, b_delta, b_hop_lse, b_hop_delta, p_k,
            p_u, i_n, size_k, step_k, step_u, qk_scale, b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D,
            BLOCK_M, BLOCK_N, HAS_LO, True, True, True,
        )  # fmt: skip
    if before is not None:
        rows_before = tl.load(before + i_o) * size_k
        b_dq, b_dlogits = _dq_all(
            b_q, b_dout, b_du_next, b_dq, b_dlogits, b_lse, b_delta, b_hop_lse, b_hop_delta,
            p_k - rows_before * step_k, p_u - rows_before * step_u, 0, rows_before, step_k, step_u,
            qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True, False,
        )  # fmt: skip
    return _dq_all(
        b_q, b_dout, b_du_next, b_dq, b_dlogits, b_lse, b_delta, b_hop_lse, b_hop_delta, p_k, p_u,
        tl.maximum(hi, full_hi), size_k, step_k, step_u, qk_scale, HEAD_DIM, BLOCK_D, BLOCK_M,
        BLOCK_N, False, True,
    )  # fmt: skip


@triton.jit
def _row_dots(
    p_a, p_b, start, o_m, o_g, size, step_a, step_b, stride_ah, stride_bh,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return (a, products a . b) of a tile of rows."""
    b_a = load_queries_of(
        p_a, start, o_m, o_g, size, step_a, stride_ah, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    b_b = load_queries_of(
        p_b, start, o_m, o_g, size, step_b, stride_bh, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    return b_a, tl.sum(b_a.to(tl.float32) * b_b.to(tl.float32), 1)


@triton.jit
def _load_rows_of_branch(
    p_dout, out, lse, bias, delta, i_b, i_h, row_q, o_row, m_m, start, o_m, o_g, size_q,
    step_dout, stride_dout_h, step_own, seqlen, nheads,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return (dout, delta, lse2) of a tile of rows; store delta where out is given."""
    if out is not None:
        p_out = head_rows(out, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
        b_dout, b_delta = _row_dots(
            p_dout, p_out, start, o_m, o_g, size_q, step_dout, step_own, stride_dout_h, HEAD_DIM,
            HEADS, HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        tl.store(delta + o_row, b_delta, mask=m_m)
    else:
        b_dout = load_queries_of(
            p_dout, start, o_m, o_g, size_q, step_dout, stride_dout_h, HEADS, HEAD_DIM, BLOCK_D,
            BLOCK_M,
        )  # fmt: skip
        b_delta = tl.load(delta + o_row, mask=m_m, other=0.0)
    # Rows past the end have weights exp(-inf) = 0, masked or not.
    b_lse = tl.load(lse + o_row, mask=m_m, other=float("inf"))
    if bias is not None:
        b_lse -= tl.load(bias + i_h + o_g)
    return b_dout, b_delta, b_lse * LOG2E


@triton.jit
def _finish_dq(
    b_dq, dq, prev_dq, hop_dq, angles, turns, factor, i_b, i_h, stride_ab, row_q, start, o_m, o_g,
    size_q, stride64, seqlen, nheads,
    GROUP_K: tl.constexpr, MEAN: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Store dq of a tile of queries, with what the hop's mean queries and other modes gave."""
    if hop_dq is not None:
        heads_k = nheads // GROUP_K
        p_hop_dq = head_rows(hop_dq, i_b, i_h // GROUP_K, row_q, seqlen, heads_k, HEAD_DIM)
        step_hop = heads_k * HEAD_DIM * stride64
        # The heads of a group have one mean.
        b_hop = load_queries_of(
            p_hop_dq, start, o_m, o_g, size_q, step_hop, 0, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M
        )
        b_dq += b_hop / GROUP_K
    if MEAN == 1:
        b_dq = rotate_tile(
            b_dq, angles, turns, factor, i_b, stride_ab, row_q, o_m, size_q, stride64, -1,
            HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
    step_own = nheads * HEAD_DIM * stride64
    if prev_dq is not None:
        p_prev = head_rows(prev_dq, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
        b_prev = load_queries_of(
            p_prev, start, o_m, o_g, size_q, step_own, HEAD_DIM, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M
        )
        b_dq += b_prev.to(tl.float32)
    p_dq = head_rows(dq, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
    store_queries_of(
        p_dq, b_dq, start, o_m, o_g, size_q, step_own, HEAD_DIM, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M
    )


@triton.jit
def _tensorized_bwd_dq_kernel(
    q, k, u, dout, out, lse, bias, delta, fibre_lse, fibre_delta, dlogits,
    du_next, u_next, hop_lse, fibre_hop_lse, fibre_hop_delta,
    prev_dq, hop_dq, used_q, dq, angles, turns,
    q_idx, q_lo, k_idx, ranges, before,
    factor, stride_ab, softmax_scale, size_q, size_k, stride, outers, nheads, seqlen,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_ub, stride_us, stride_uh, stride_dout_b, stride_dout_s, stride_dout_h,
    GROUP_K: tl.constexpr, GROUP_U: tl.constexpr, MEAN: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr,
    BRANCH: tl.constexpr, HOP: tl.constexpr, HEADS: tl.constexpr, DESCRIBED: tl.constexpr,
    EVEN_N: tl.constexpr,
):  # fmt: skip
    """Compute dq of a tile of queries, the row sums of dlogits, and what dk and dU need.

    None stands for what a launch does not have.

    out: given where delta is still to be made. lse, bias: of the whole row, and of the branch.
    du_next, u_next, hop_lse: of the hop, the last in base 2. fibre_lse, fibre_delta, fibre_hop_lse,
    fibre_hop_delta: made here, lse less bias in base 2 and the products of rows; in the order of
    fibres, as the kernel that owns keys reads runs of a fibre. prev_dq: what other modes gave.
    hop_dq: the gradient of the hop's mean queries. used_q: made here, the queries as means and
    rotated. dq of a mean stays rotated, as hop_dq. MEAN, HEADS, DESCRIBED, EVEN_N, angles, turns,
    factor: as in the forward kernel.
    """
    tiles = tl.cdiv(size_q, BLOCK_M // HEADS)
    i_m, i_h, i_r, i_o = program_coords(tiles, stride, nheads // HEADS)
    i_h *= HEADS
    i_m = tiles - 1 - i_m
    i_b, i_o = i_o // outers, i_o % outers
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
    if used_q is not None:
        p_used = head_rows(used_q, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
        store_queries_of(
            p_used, b_q, start, o_m, o_g, size_q, step_own, HEAD_DIM, HEADS, HEAD_DIM, BLOCK_D,
            BLOCK_M,
        )  # fmt: skip
        # Loaded again, the queries are in shared memory: as results they would stay in registers.
        tl.debug_barrier()
        b_q = load_queries_of(
            p_used, start, o_m, o_g, size_q, step_own, HEAD_DIM, HEADS, HEAD_DIM, BLOCK_D, BLOCK_M
        )
    # The fibre's place among those of a sequence, times its tokens.
    o_fibre = (i_b * nheads + i_h) * seqlen + (i_o * stride + i_r) * size_q + o_m
    if HEADS > 1:
        o_fibre += tl.cast(o_g, tl.int64) * seqlen
    if HOP:
        p_du_next = head_rows(du_next, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
        p_u_next = head_rows(u_next, i_b, i_h, row_q, seqlen, nheads, HEAD_DIM)
        b_du_next, b_hop_delta = _row_dots(
            p_du_next, p_u_next, start, o_m, o_g, size_q, step_own, step_own, HEAD_DIM, HEAD_DIM,
            HEADS, HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        b_hop_lse = tl.load(hop_lse + o_row, mask=m_m, other=float("inf"))
        tl.store(fibre_hop_lse + o_fibre, b_hop_lse, mask=m_m)
        tl.store(fibre_hop_delta + o_fibre, b_hop_delta, mask=m_m)
    qk_scale = softmax_scale * LOG2E
    if BRANCH:
        p_dout = dout + i_b * stride_dout_b + i_h * stride_dout_h + row_q * stride_dout_s
        b_dout, b_delta, b_lse = _load_rows_of_branch(
            p_dout, out, lse, bias, delta, i_b, i_h, row_q, o_row, m_m, start, o_m, o_g, size_q,
            stride_dout_s * stride64, stride_dout_h, step_own, seqlen, nheads, HEADS,
            HEAD_DIM, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        tl.store(fibre_lse + o_fibre, b_lse, mask=m_m)
        tl.store(fibre_delta + o_fibre, b_delta, mask=m_m)
        b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, m_m, HAS_LO)
        lo, full_lo, full_hi, hi = load_range(ranges, i_m)
    if BRANCH and HOP:
        b_dq, b_dlogits = _fork_dq(
            b_q, b_dout, b_du_next, b_lse, b_delta, b_hop_lse, b_hop_delta, k, u, lo, full_lo,
            full_hi, hi, before, i_o, size_k, step_k, step_u, qk_scale, b_q_idx, b_q_lo, k_idx,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
        )  # fmt: skip
    elif BRANCH:
        b_dq, b_dlogits = dq_loop(
            b_q, b_dout, b_lse, b_delta, k, u, at, lo, full_lo, full_hi, hi, size_k, step_k, step_u,
            qk_scale, b_q_idx, b_q_lo, k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO,
            DESCRIBED, dlogits is not None,
        )  # fmt: skip
    else:
        b_all = None if EVEN_N and DESCRIBED else tl.full([BLOCK_M], 2147483646, tl.int32)
        b_dq, b_dlogits = dq_loop(
            b_q, b_du_next, b_hop_lse, b_hop_delta, k, u, at, 0, 0, size_k // BLOCK_N,
            tl.cdiv(size_k, BLOCK_N), size_k, step_k, step_u, qk_scale, b_all, b_all, None,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False, DESCRIBED, False,
        )  # fmt: skip
    if BRANCH and dlogits is not None:
        tl.store(dlogits + o_row, b_dlogits, mask=m_m)
    _finish_dq(
        b_dq * softmax_scale, dq, prev_dq, hop_dq, angles, turns, factor, i_b, i_h, stride_ab,
        row_q, start, o_m, o_g, size_q, stride64, seqlen, nheads, GROUP_K, MEAN, HEADS, HEAD_DIM,
        BLOCK_D, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _load_stats(p_lse, p_delta, start, size_q, BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr):
    """Return lse, base 2, and delta of a tile of queries; inf and 0 past the end."""
    # First the scalar, so that a thread's offsets are constants.
    o_m = tl.arange(0, BLOCK_M)
    p_lse, p_delta = p_lse + start + o_m, p_delta + start + o_m
    if EVEN_M:
        b_lse, b_delta = tl.load(p_lse), tl.load(p_delta)
    else:
        m_m = start + o_m < size_q
        b_lse = tl.load(p_lse, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_delta, mask=m_m, other=0.0)
    return b_lse, b_delta


@triton.jit
def _dkv_step(
    b_k, b_u, b_dk, b_du, q, dout, at, p_lse, p_delta, i_m, masked, size_q, stride, step_q,
    step_dout, qk_scale, q_idx, q_lo, b_k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, du) after one more tile of queries; dk without softmax_scale.

    Queries of a branch with dout, or of a hop with the gradient of its result. Scores are
    transposed, `[BLOCK_N, BLOCK_M]`, so they are the left operand of a product as they are. q,
    dout, at: as `fibre_sources` returns them. masked: whether a query may not see a key.
    """
    start = i_m * BLOCK_M
    b_q, b_dout = load_pair(
        q, dout, at, start, size_q, step_q, step_dout, HEAD_DIM, BLOCK_D, BLOCK_M, EVEN_M, DESCRIBED
    )
    b_s = dot(b_k, tl.trans(b_q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    # Both products go before the exponentials, which then run beside the second.
    b_dp = dot(b_u, tl.trans(b_dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    b_lse, b_delta = _load_stats(p_lse, p_delta, start, size_q, BLOCK_M, EVEN_M)
    b_p = tl.exp2(b_s * qk_scale - b_lse[None, :])
    if masked:
        o_m = start + tl.arange(0, BLOCK_M)
        b_q_idx, b_q_lo = load_limits(q_idx, q_lo, o_m, o_m < size_q, HAS_LO)
        m_s = is_visible(b_q_idx[None, :], b_q_lo[None, :], b_k_idx[:, None], HAS_LO)
        b_p = tl.where(m_s, b_p, 0.0)
    b_du = dot(b_p.to(b_dout.dtype), b_dout, b_du)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    return b_dk, b_du


@triton.jit
def _dkv_all(
    b_k, b_u, b_dk, b_du, q, dout, at, p_lse, p_delta, size_q, stride, step_q, step_dout, qk_scale,
    b_k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, du) after size_q queries that all see the keys."""
    for i in range(0, tl.cdiv(size_q, BLOCK_M)):
        b_dk, b_du = _dkv_step(
            b_k, b_u, b_dk, b_du, q, dout, at, p_lse, p_delta, i, False, size_q, stride, step_q,
            step_dout, qk_scale, None, None, b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
            EVEN_M, DESCRIBED,
        )  # fmt: skip
    return b_dk, b_du


@triton.jit
def _dkv_branch(
    b_k, b_u, b_dk, b_du, q, dout, at, p_lse, p_delta, run, after, i_o, size_q, stride, step_q,
    step_dout, qk_scale, q_idx, q_lo, b_k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LO: tl.constexpr, EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, du) after all queries whose branch sees the keys; later blocks come last."""
    lo, full_lo, full_hi, hi = run
    whole, masked = full_hi - full_lo, (full_lo - lo) + (hi - full_hi)
    if DESCRIBED:
        for i in range(0, whole + masked):
            i_m = tl.where(i < whole, full_lo + i, nth_masked(i - whole, lo, full_lo, full_hi))
            b_dk, b_du = _dkv_step(
                b_k, b_u, b_dk, b_du, q, dout, at, p_lse, p_delta, i_m, i >= whole, size_q, stride,
                step_q, step_dout, qk_scale, q_idx, q_lo, b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M,
                BLOCK_N, HAS_LO, EVEN_M, True,
            )  # fmt: skip
    else:
        for i in range(0, whole):
            b_dk, b_du = _dkv_step(
                b_k, b_u, b_dk, b_du, q, dout, at, p_lse, p_delta, full_lo + i, False, size_q,
                stride, step_q, step_dout, qk_scale, q_idx, q_lo, b_k_idx, HEAD_DIM, BLOCK_D,
                BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, False,
            )  # fmt: skip
        for i in range(0, masked):
            i_m = nth_masked(i, lo, full_lo, full_hi)
            b_dk, b_du = _dkv_step(
                b_k, b_u, b_dk, b_du, q, dout, at, p_lse, p_delta, i_m, True, size_q, stride,
                step_q, step_dout, qk_scale, q_idx, q_lo, b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M,
                BLOCK_N, HAS_LO, EVEN_M, False,
            )  # fmt: skip
    if after is not None:
        skipped = tl.cast(size_q, tl.int64)
        b_dk, b_du = _dkv_all(
            b_k, b_u, b_dk, b_du, q + skipped * step_q, dout + skipped * step_dout, at,
            p_lse + skipped, p_delta + skipped, tl.load(after + i_o) * size_q, stride, step_q,
            step_dout, qk_scale, b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, EVEN_M, False,
        )  # fmt: skip
    return b_dk, b_du


@triton.jit
def _dkv_hop(
    b_k, b_u, b_dk, b_du, hop_q, du_next, hop_lse, hop_delta, i_b, i_h, nheads, row_q, i_fibre,
    seqlen, size_q, stride, stride_qb, stride_qs, stride_qh, qk_scale, b_k_idx,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_M: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, du) after head i_h of `nheads` of a hop's queries."""
    stride64 = tl.cast(stride, tl.int64)
    i_row = (i_b * nheads + i_h) * seqlen + i_fibre * size_q
    stride_us = nheads * HEAD_DIM
    hop_q, du_next, at = fibre_sources(
        hop_q, du_next, i_b, i_h, i_h, row_q, stride, stride_qb, stride_qs, stride_qh,
        tl.cast(seqlen, tl.int64) * stride_us, stride_us, HEAD_DIM, DESCRIBED,
    )  # fmt: skip
    return _dkv_all(
        b_k, b_u, b_dk, b_du, hop_q, du_next, at, hop_lse + i_row, hop_delta + i_row, size_q,
        stride, stride_qs * stride64, stride_us * stride64, qk_scale, b_k_idx, HEAD_DIM, BLOCK_D,
        BLOCK_M, BLOCK_N, EVEN_M, DESCRIBED,
    )  # fmt: skip


@triton.jit
def _tensorized_bwd_dkv_kernel(
    q, k, u, dout, lse2, delta, hop_q, du_next, hop_lse, hop_delta, prev_dk, dk, du, angles, turns,
    q_idx, q_lo, k_idx, ranges, after,
    factor, stride_ab, softmax_scale, size_q, size_k, stride, outers, nheads, seqlen, seqlen_k,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_ub, stride_us, stride_uh, stride_dout_b, stride_dout_s, stride_dout_h,
    stride_hop_qb, stride_hop_qs, stride_hop_qh,
    GROUP_K: tl.constexpr, GROUP_U: tl.constexpr, GROUP_HOP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LO: tl.constexpr,
    EVEN_M: tl.constexpr, BRANCH: tl.constexpr, HOP: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Compute dk and du of a tile of a fibre's keys from all query heads of the key head.

    First through the branch, then through the hop: both in one step need more registers than there
    are. None stands for what a launch does not have.

    lse2, delta, hop_lse, hop_delta: made by the dq kernel, in the order of fibres. hop_q: the hop's
    queries, GROUP_HOP heads for each key head: GROUP_K, or the mean alone. prev_dk: what other
    modes gave, to be added. nheads: of keys. after: branches of after[o] blocks behind block o see
    all of it. GROUP_U is 1, where each query head has its own U, or GROUP_K. q and k are rotated
    already; angles, turns, factor: of the rotation that dk is turned back from. DESCRIBED: q and
    dout of a branch alone, or hop_q and du_next of a hop alone, are descriptors.
    """
    tiles = tl.cdiv(size_k, BLOCK_N)
    i_n, i_hk, i_r, i_o = program_coords(tiles, stride, nheads)
    i_b, i_o = i_o // outers, i_o % outers
    i_fibre = i_o * stride + i_r
    row_q = i_o * size_q * stride + i_r
    row_k = i_o * size_k * stride + i_r
    i_hu = i_hk * (GROUP_K // GROUP_U)
    heads_u = nheads * (GROUP_K // GROUP_U)
    p_k = k + i_b * stride_kb + i_hk * stride_kh + row_k * stride_ks
    p_u = u + i_b * stride_ub + i_hu * stride_uh + row_k * stride_us
    p_du = head_rows(du, i_b, i_hu, row_k, seqlen_k, heads_u, HEAD_DIM)
    stride64 = tl.cast(stride, tl.int64)
    step_q, step_dout = stride_qs * stride64, stride_dout_s * stride64
    step_u, step_du = stride_us * stride64, heads_u * HEAD_DIM * stride64

    start = i_n * BLOCK_N
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_tile(p_k, start, size_k, stride_ks * stride64, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    b_u = load_tile(p_u, start, size_k, step_u, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    b_k_idx = load_key_numbers(k_idx, o_n, size_k)
    if BRANCH:
        run = load_range(ranges, i_n)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_du = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    qk_scale = softmax_scale * LOG2E
    for i_g in range(0, GROUP_K):
        i_h = i_hk * GROUP_K + i_g
        if GROUP_U == 1 and GROUP_K > 1:
            b_u = load_tile(p_u, start, size_k, step_u, BLOCK_N, HEAD_DIM, BLOCK_D, False)
            b_du = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if BRANCH:
            i_row = (i_b * (nheads * GROUP_K) + i_h) * seqlen + i_fibre * size_q
            of_q, of_dout, at = fibre_sources(
                q, dout, i_b, i_h, i_h, row_q, stride, stride_qb, stride_qs, stride_qh,
                stride_dout_b, stride_dout_s, stride_dout_h, DESCRIBED,
            )  # fmt: skip
            b_dk, b_du = _dkv_branch(
                b_k, b_u, b_dk, b_du, of_q, of_dout, at, lse2 + i_row, delta + i_row, run, after,
                i_o, size_q, stride, step_q, step_dout, qk_scale, q_idx, q_lo, b_k_idx, HEAD_DIM,
                BLOCK_D, BLOCK_M, BLOCK_N, HAS_LO, EVEN_M, DESCRIBED,
            )  # fmt: skip
        if HOP and GROUP_HOP == GROUP_K:
            b_dk, b_du = _dkv_hop(
                b_k, b_u, b_dk, b_du, hop_q, du_next, hop_lse, hop_delta, i_b, i_h,
                nheads * GROUP_HOP, row_q, i_fibre, seqlen, size_q, stride, stride_hop_qb,
                stride_hop_qs, stride_hop_qh, qk_scale, b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M,
                BLOCK_N, EVEN_M, DESCRIBED,
            )  # fmt: skip
        if GROUP_U == 1:
            store_tile(p_du, b_du, start, size_k, step_du, BLOCK_N, HEAD_DIM, BLOCK_D)
            p_u += stride_uh
            p_du += HEAD_DIM
    if HOP and GROUP_HOP < GROUP_K:
        b_dk, b_du = _dkv_hop(
            b_k, b_u, b_dk, b_du, hop_q, du_next, hop_lse, hop_delta, i_b, i_hk, nheads, row_q,
            i_fibre, seqlen, size_q, stride, stride_hop_qb, stride_hop_qs, stride_hop_qh, qk_scale,
            b_k_idx, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, EVEN_M, DESCRIBED,
        )  # fmt: skip
    if GROUP_U > 1:
        store_tile(p_du, b_du, start, size_k, step_du, BLOCK_N, HEAD_DIM, BLOCK_D)
    b_dk = rotate_tile(
        b_dk * softmax_scale, angles, turns, factor, i_b, stride_ab, row_k, o_n, size_k, stride, -1,
        HEAD_DIM, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    step_dk = nheads * HEAD_DIM * stride64
    if prev_dk is not None:
        p_prev = head_rows(prev_dk, i_b, i_hk, row_k, seqlen_k, nheads, HEAD_DIM)
        b_dk += load_tile(p_prev, start, size_k, step_dk, BLOCK_N, HEAD_DIM, BLOCK_D, False)
    p_dk = head_rows(dk, i_b, i_hk, row_k, seqlen_k, nheads, HEAD_DIM)
    store_tile(p_dk, b_dk, start, size_k, step_dk, BLOCK_N, HEAD_DIM, BLOCK_D)

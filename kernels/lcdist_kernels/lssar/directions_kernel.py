"""Directions of queries and keys, and the adjoint, in one kernel each.

With r = 1 / |x|, R the rotation of a token, a its factor (R^T R = a^2) and c the logit scale of a
query times log2 e (1 for a key), `rows.directions` and `rows.kernel_logit_scales` say

    y = c R (r x)            dx = r R^T (c dy - y (y . dy) / (c a^2))

Where |x|^2 is below `LEAST_SQUARE`, r does not depend on x and the last term is 0. Where c is 0,
as in the first row of a document, dx is 0.

    x, y, dx, dy `[b, s, h, d]`; norms `[b, h, s]`: r, negative where it does not depend on x

               heads 0 .. h - 1, key heads 0 .. h_kv - 1
             +------------------------------------------+   one program: a tile of BLOCK_S tokens of
    tokens   | -----> loop over heads, then key heads   |   one batch row, grid (token tiles, b);
             +------------------------------------------+   the tile's angles are loaded once
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.lssar.rows import LEAST_SQUARE
from lcdist_kernels.rotary_kernel import Rotation, cosines
from lcdist_kernels.triton_common import last_dim_contiguous, launch_context, strides

BLOCK_S = 16
LEAST = tl.constexpr(LEAST_SQUARE)


@triton.jit
def _program(
    scales, angles, turns, factor, stride_ab, seqlen,
    ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return a program's (row of the batch, tokens, which exist, scales, cosines, sines).

    Cosines and sines are times `factor`; where not ROTATED they are not used.
    """
    i_b = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    m_s = o_s < seqlen
    b_scale = tl.load(scales + o_s, mask=m_s, other=0.0)
    if ROTATED:
        o_f = tl.arange(0, BLOCK_H)
        b_p = tl.load(angles + i_b * stride_ab + o_s, mask=m_s, other=0)
        b_cos, b_sin = cosines(b_p, tl.load(turns + o_f, mask=o_f < HALF, other=0))
        b_cos, b_sin = b_cos * factor, b_sin * factor
    else:
        b_cos, b_sin = b_scale, b_scale
    return i_b, o_s, m_s, b_scale, b_cos, b_sin


@triton.jit
def _normalise_heads(
    x, y, norms, b_scale, b_cos, b_sin, nheads, i_b, o_s, m_s, seqlen,
    stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh,
    ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store directions and norms of a tile of tokens, all heads."""
    o_f = tl.arange(0, BLOCK_H)[None, :]
    m = m_s[:, None] & (o_f < HALF)
    o_x = i_b * stride_xb + o_s.to(tl.int64)[:, None] * stride_xs + o_f
    o_y = i_b * stride_yb + o_s.to(tl.int64)[:, None] * stride_ys + o_f
    p_norms = norms + i_b * nheads * seqlen + o_s
    for _ in range(0, nheads):
        b_one = tl.load(x + o_x, mask=m, other=0.0).to(tl.float32)
        b_two = tl.load(x + o_x + HALF, mask=m, other=0.0).to(tl.float32)
        b_square = tl.sum(b_one * b_one + b_two * b_two, 1)
        b_norm = 1.0 / tl.sqrt(tl.maximum(b_square, LEAST))
        tl.store(p_norms, tl.where(b_square < LEAST, -b_norm, b_norm), mask=m_s)
        b_factor = (b_norm * b_scale)[:, None]
        b_one, b_two = b_one * b_factor, b_two * b_factor
        if ROTATED:
            b_turned = b_one * b_cos - b_two * b_sin
            b_two = b_two * b_cos + b_one * b_sin
            b_one = b_turned
        tl.store(y + o_y, b_one.to(y.dtype.element_ty), mask=m)
        tl.store(y + o_y + HALF, b_two.to(y.dtype.element_ty), mask=m)
        o_x += stride_xh
        o_y += stride_yh
        p_norms += seqlen


@triton.jit
def _lssar_directions_kernel(
    q, k, queries, keys, q_norms, k_norms, scales, angles, turns,
    factor, stride_ab, seqlen, nheads, nheads_kv,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh,
    stride_queries_b, stride_queries_s, stride_queries_h,
    stride_keys_b, stride_keys_s, stride_keys_h,
    ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Compute the directions of q, times the logit scales `[s]`, and those of k.

    angles, turns, factor: of a `Rotation`, where ROTATED.
    """
    i_b, o_s, m_s, b_scale, b_cos, b_sin = _program(
        scales, angles, turns, factor, stride_ab, seqlen, ROTATED, HALF, BLOCK_H, BLOCK_S
    )
    _normalise_heads(
        q, queries, q_norms, b_scale, b_cos, b_sin, nheads, i_b, o_s, m_s, seqlen,
        stride_qb, stride_qs, stride_qh, stride_queries_b, stride_queries_s, stride_queries_h,
        ROTATED, HALF, BLOCK_H,
    )  # fmt: skip
    _normalise_heads(
        k, keys, k_norms, tl.full([BLOCK_S], 1.0, tl.float32), b_cos, b_sin, nheads_kv, i_b, o_s,
        m_s, seqlen, stride_kb, stride_ks, stride_kh, stride_keys_b, stride_keys_s, stride_keys_h,
        ROTATED, HALF, BLOCK_H,
    )  # fmt: skip


@triton.jit
def _adjoint_heads(
    dy, y, norms, dx, b_scale, b_cos, b_sin, factor, nheads, i_b, o_s, m_s, seqlen,
    stride_dyb, stride_dys, stride_dyh, stride_yb, stride_ys, stride_yh,
    stride_dxb, stride_dxs, stride_dxh,
    ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a tile of tokens, all heads."""
    o_f = tl.arange(0, BLOCK_H)[None, :]
    m = m_s[:, None] & (o_f < HALF)
    o_row = o_s.to(tl.int64)[:, None]
    o_dy = i_b * stride_dyb + o_row * stride_dys + o_f
    o_y = i_b * stride_yb + o_row * stride_ys + o_f
    o_dx = i_b * stride_dxb + o_row * stride_dxs + o_f
    p_norms = norms + i_b * nheads * seqlen + o_s
    b_square = b_scale * factor * factor
    b_share = tl.where(b_square == 0, 0.0, 1.0 / tl.where(b_square == 0, 1.0, b_square))
    for _ in range(0, nheads):
        b_norm = tl.load(p_norms, mask=m_s, other=0.0)
        b_one = tl.load(dy + o_dy, mask=m, other=0.0)
        b_two = tl.load(dy + o_dy + HALF, mask=m, other=0.0)
        b_y_one = tl.load(y + o_y, mask=m, other=0.0).to(tl.float32)
        b_y_two = tl.load(y + o_y + HALF, mask=m, other=0.0).to(tl.float32)
        b_along = tl.sum(b_one * b_y_one + b_two * b_y_two, 1) * b_share
        b_along = tl.where(b_norm > 0, b_along, 0.0)[:, None]
        b_one = b_one * b_scale[:, None] - b_y_one * b_along
        b_two = b_two * b_scale[:, None] - b_y_two * b_along
        if ROTATED:
            b_turned = b_one * b_cos + b_two * b_sin
            b_two = b_two * b_cos - b_one * b_sin
            b_one = b_turned
        b_norm = tl.abs(b_norm)[:, None]
        tl.store(dx + o_dx, (b_one * b_norm).to(dx.dtype.element_ty), mask=m)
        tl.store(dx + o_dx + HALF, (b_two * b_norm).to(dx.dtype.element_ty), mask=m)
        o_dy += stride_dyh
        o_y += stride_yh
        o_dx += stride_dxh
        p_norms += seqlen


@triton.jit
def _lssar_directions_bwd_kernel(
    dqueries, dkeys, queries, keys, q_norms, k_norms, dq, dk, scales, angles, turns,
    factor, stride_ab, seqlen, nheads, nheads_kv,
    stride_dqueries_b, stride_dqueries_s, stride_dqueries_h,
    stride_dkeys_b, stride_dkeys_s, stride_dkeys_h,
    stride_queries_b, stride_queries_s, stride_queries_h,
    stride_keys_b, stride_keys_s, stride_keys_h,
    stride_dqb, stride_dqs, stride_dqh, stride_dkb, stride_dks, stride_dkh,
    ROTATED: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of q and k from those of their directions, which are fp32."""
    i_b, o_s, m_s, b_scale, b_cos, b_sin = _program(
        scales, angles, turns, factor, stride_ab, seqlen, ROTATED, HALF, BLOCK_H, BLOCK_S
    )
    _adjoint_heads(
        dqueries, queries, q_norms, dq, b_scale, b_cos, b_sin, factor, nheads, i_b, o_s, m_s,
        seqlen, stride_dqueries_b, stride_dqueries_s, stride_dqueries_h, stride_queries_b,
        stride_queries_s, stride_queries_h, stride_dqb, stride_dqs, stride_dqh, ROTATED, HALF,
        BLOCK_H,
    )  # fmt: skip
    _adjoint_heads(
        dkeys, keys, k_norms, dk, tl.full([BLOCK_S], 1.0, tl.float32), b_cos, b_sin, factor,
        nheads_kv, i_b, o_s, m_s, seqlen, stride_dkeys_b, stride_dkeys_s, stride_dkeys_h,
        stride_keys_b, stride_keys_s, stride_keys_h, stride_dkb, stride_dks, stride_dkh, ROTATED,
        HALF, BLOCK_H,
    )  # fmt: skip


class Directions(NamedTuple):
    """Directions of the queries and keys of the same tokens, and what their adjoint needs.

    Attributes:
        queries, keys: `[b, s, h, d]`, `[b, s, h_kv, d]`; queries times their logit scales.
        q_norms, k_norms: 1 / |x|, fp32 `[b, h, s]`, `[b, h_kv, s]`; negative where |x|^2 is below
            `LEAST_SQUARE`.
    """

    queries: Tensor
    keys: Tensor
    q_norms: Tensor
    k_norms: Tensor


class DirectionTables(NamedTuple):
    """`rows.kernel_logit_scales` `[s]`, and the rotation of the tokens, if there is one."""

    scales: Tensor
    rotation: Rotation | None

    @property
    def arguments(self) -> tuple[Tensor | None, Tensor | None, float, int]:
        """Return angles, turns, factor and the angles' batch stride, as kernels take them."""
        if self.rotation is None:
            return None, None, 1.0, 0
        angles, turns, factor = self.rotation
        return angles, turns, factor, self.rotation.stride

    def constants(self, head_dim: int) -> dict[str, int | bool]:
        """Return the constants of a kernel."""
        half = head_dim // 2
        sizes = {"HALF": half, "BLOCK_H": triton.next_power_of_2(half), "BLOCK_S": BLOCK_S}
        return {"ROTATED": self.rotation is not None, **sizes}


def directions_of(q: Tensor, k: Tensor, tables: DirectionTables) -> Directions:
    """Return the directions of q `[b, s, h, d]` and k `[b, s, h_kv, d]`, in their dtype.

    bf16, fp16 and fp32; see `rows.directions`.
    """
    q, k = last_dim_contiguous(q), last_dim_contiguous(k)
    batch, seqlen, nheads, head_dim = q.shape
    made = Directions(
        *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)),
        *(
            torch.empty(batch, x.shape[2], seqlen, dtype=torch.float32, device=x.device)
            for x in (q, k)
        ),
    )
    if not q.numel():
        return made
    with launch_context(q):
        _lssar_directions_kernel[_grid(q)](
            q, k, *made, tables.scales, *tables.arguments, seqlen, nheads, k.shape[2],
            *strides(q, k, *made[:2]), **tables.constants(head_dim),
        )  # fmt: skip
    return made


def directions_bwd(
    dqueries: Tensor, dkeys: Tensor, made: Directions, tables: DirectionTables
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k from those of their directions, in the directions' dtype.

    dqueries, dkeys: fp32, shaped like q and k.
    """
    dqueries, dkeys = last_dim_contiguous(dqueries), last_dim_contiguous(dkeys)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in made[:2])
    _, seqlen, nheads, head_dim = dq.shape
    if not dq.numel():
        return dq, dk
    with launch_context(dq):
        _lssar_directions_bwd_kernel[_grid(dq)](
            dqueries, dkeys, *made, dq, dk, tables.scales, *tables.arguments, seqlen, nheads,
            dk.shape[2], *strides(dqueries, dkeys, *made[:2], dq, dk),
            **tables.constants(head_dim),
        )  # fmt: skip
    return dq, dk


def _grid(x: Tensor) -> tuple[int, int]:
    """Return the grid of programs for x `[b, s, h, d]`."""
    return triton.cdiv(x.shape[1], BLOCK_S), x.shape[0]

"""Split of the fused projection with rotation, and its adjoint, each one kernel.

mixed `[s, b, h_kv, r + 2, d]`    q `[b, s, h_kv * r, d]`    k, v `[b, s, h_kv, d]`

grid    (tiles of BLOCK_S tokens, batch); a program loops over all heads of its tokens and
        reads and writes every element once
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.qkv.shape import QkvShape
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.rotary_kernel import BLOCK_S, cosines, token_program
from lcdist_kernels.triton_common import last_dim_contiguous, launch_context, strides


@triton.jit
def _turned(p_from, p_to, b_cos, b_sin, m, HALF: tl.constexpr, TURN: tl.constexpr):
    """Move one head of a tile of tokens, rotated if TURN."""
    b_one = tl.load(p_from, mask=m, other=0.0)
    b_two = tl.load(p_from + HALF, mask=m, other=0.0)
    if TURN:
        b_x, b_y = b_one.to(tl.float32), b_two.to(tl.float32)
        b_one = (b_x * b_cos - b_y * b_sin).to(p_to.dtype.element_ty)
        b_two = (b_y * b_cos + b_x * b_sin).to(p_to.dtype.element_ty)
    tl.store(p_to, b_one, mask=m)
    tl.store(p_to + HALF, b_two, mask=m)


@triton.jit
def _qkv_kernel(
    mixed, q, k, v,
    positions,
    steps,
    factor, sign, seqlen, nheads_kv,
    stride_ms, stride_mb,
    stride_qb, stride_qs, stride_qh,
    stride_kb, stride_ks, stride_kh,
    stride_vb, stride_vs, stride_vh,
    stride_pb,
    GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
    TURN: tl.constexpr, JOIN: tl.constexpr,
):  # fmt: skip
    """Split a tile of tokens; JOIN: put q, k and v back. sign = -1 rotates back."""
    i_b, o_s, o_f, m_s, m_f = token_program(seqlen, HALF, BLOCK_H, BLOCK_S)
    m = m_s[:, None] & m_f[None, :]
    b_cos, b_sin = 1.0, 0.0
    if TURN:
        b_p = tl.load(positions + i_b * stride_pb + o_s, mask=m_s, other=0)
        b_cos, b_sin = cosines(b_p, tl.load(steps + o_f, mask=m_f, other=0))
        b_cos, b_sin = b_cos * factor, b_sin * (factor * sign)
    rows = o_s.to(tl.int64)[:, None]
    p_m = mixed + i_b * stride_mb + rows * stride_ms + o_f[None, :]
    p_q = q + i_b * stride_qb + rows * stride_qs + o_f[None, :]
    p_k = k + i_b * stride_kb + rows * stride_ks + o_f[None, :]
    p_v = v + i_b * stride_vb + rows * stride_vs + o_f[None, :]
    for _ in range(0, nheads_kv):
        for _ in range(0, GROUP):
            if JOIN:
                _turned(p_q, p_m, b_cos, b_sin, m, HALF, TURN)
            else:
                _turned(p_m, p_q, b_cos, b_sin, m, HALF, TURN)
            p_m += 2 * HALF
            p_q += stride_qh
        if JOIN:
            _turned(p_k, p_m, b_cos, b_sin, m, HALF, TURN)
            _turned(p_v, p_m + 2 * HALF, b_cos, b_sin, m, HALF, False)
        else:
            _turned(p_m, p_k, b_cos, b_sin, m, HALF, TURN)
            _turned(p_m + 2 * HALF, p_v, b_cos, b_sin, m, HALF, False)
        p_m += 4 * HALF
        p_k += stride_kh
        p_v += stride_vh


def split_by_kernel(
    mixed: Tensor, shape: QkvShape, rotary: Rotary | None, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return contiguous q, k and v; arguments as of `split_qkv`."""
    mixed = last_dim_contiguous(mixed)
    seqlen, batch, _ = mixed.shape
    q, k, v = (
        mixed.new_empty(batch, seqlen, nheads, shape.head_dim)
        for nheads in (shape.nheads_kv * shape.group, shape.nheads_kv, shape.nheads_kv)
    )
    _launch(mixed, (q, k, v), shape, rotary, positions, join=False)
    return q, k, v


def join_by_kernel(
    grads: Sequence[Tensor], shape: QkvShape, rotary: Rotary | None, positions: Tensor | None
) -> Tensor:
    """Return the gradient of `mixed` from those of q, k and v."""
    dq, dk, dv = map(last_dim_contiguous, grads)
    batch, seqlen, nheads_kv, head_dim = dk.shape
    dmixed = dk.new_empty(seqlen, batch, nheads_kv * (shape.group + 2) * head_dim)
    _launch(dmixed, (dq, dk, dv), shape, rotary, positions, join=True)
    return dmixed


def _launch(
    mixed: Tensor,
    qkv: tuple[Tensor, Tensor, Tensor],
    shape: QkvShape,
    rotary: Rotary | None,
    positions: Tensor | None,
    join: bool,
) -> None:
    if not mixed.numel():
        return
    turn = None
    if rotary is not None and positions is not None:
        turn = rotary.rotation(positions, qkv[0])
    seqlen, batch, _ = mixed.shape
    half = shape.head_dim // 2
    with launch_context(mixed):
        _qkv_kernel[(triton.cdiv(seqlen, BLOCK_S), batch)](
            mixed, *qkv,
            None if turn is None else turn.angles,
            None if turn is None else turn.turns,
            1.0 if turn is None else turn.factor,
            -1.0 if join else 1.0,
            seqlen, shape.nheads_kv,
            mixed.stride(0), mixed.stride(1), *strides(*qkv),
            0 if turn is None else turn.stride,
            GROUP=shape.group, HALF=half, BLOCK_H=triton.next_power_of_2(half), BLOCK_S=BLOCK_S,
            TURN=turn is not None, JOIN=join,
        )  # fmt: skip

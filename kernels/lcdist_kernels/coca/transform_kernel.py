"""CoCA's elementwise maps as kernels that read once and write once; formulas in `transform.py`.

    q, q', dq `[b, s, h, d]`; t, k' `[b, s, h_kv, d]`; tau `[b, s, h_kv, d / 2]`; cos, sin
    `[1 or b, s, 1, d / 2]`

               heads 0 .. h - 1, key heads 0 .. h_kv - 1
             +------------------------------------------+   one program: a tile of BLOCK_S tokens of
    tokens   | -----> loop over heads, then key heads   |   one batch row, grid (token tiles, b);
             +------------------------------------------+   the tile's angles are loaded once

One launch maps queries and keys, or, with no heads of the other kind, only one of them. Products
are fp32; only results are rounded.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.coca.transform import Angles
from lcdist_kernels.triton_common import last_dim_contiguous, launch_context, strides

BLOCK_S = 16


@triton.jit
def _offsets(i_b, o_row, o_f, stride_b, stride_s):
    """Return the offsets of a tile of tokens in head 0: `[BLOCK_S, BLOCK_H]`."""
    return i_b * stride_b + o_row * stride_s + o_f


@triton.jit
def _load_halves(p, o, m, HALF: tl.constexpr):
    """Return the two halves of the features of one head, in fp32."""
    b_one = tl.load(p + o, mask=m, other=0.0).to(tl.float32)
    b_two = tl.load(p + o + HALF, mask=m, other=0.0).to(tl.float32)
    return b_one, b_two


@triton.jit
def _store_halves(p, o, b_one, b_two, m, HALF: tl.constexpr):
    """Store the two halves of the features of one head, in the tensor's dtype."""
    tl.store(p + o, b_one.to(p.dtype.element_ty), mask=m)
    tl.store(p + o + HALF, b_two.to(p.dtype.element_ty), mask=m)


@triton.jit
def _program(
    cos, sin, seqlen, stride_ab, stride_as,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Return a program's (row of the batch, tokens, features, mask, cosines, sines)."""
    i_b = tl.program_id(1).to(tl.int64)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_f = tl.arange(0, BLOCK_H)[None, :]
    m = (o_s < seqlen)[:, None] & (o_f < HALF)
    o_row = o_s.to(tl.int64)[:, None]
    o = _offsets(i_b, o_row, o_f, stride_ab, stride_as)
    b_cos = tl.load(cos + o, mask=m, other=0.0)
    b_sin = tl.load(sin + o, mask=m, other=0.0)
    return i_b, o_row, o_f, m, b_cos, b_sin


@triton.jit
def _key_factors(b_cos, b_sin, STRICT: tl.constexpr):
    """Return the factors of tau in the two halves of k'."""
    if STRICT:
        b_one, b_two = b_cos, b_sin
    else:
        b_one, b_two = b_cos - b_sin, b_cos + b_sin
    return b_one, b_two


@triton.jit
def _coca_fwd_kernel(
    q, t, queries, keys, tau, cos, sin,
    seqlen, nheads, nheads_kv,
    stride_qb, stride_qs, stride_qh, stride_tb, stride_ts, stride_th,
    stride_queries_b, stride_queries_s, stride_queries_h,
    stride_keys_b, stride_keys_s, stride_keys_h, stride_tau_b, stride_tau_s, stride_tau_h,
    stride_ab, stride_as,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, STRICT: tl.constexpr,
    RECTIFY: tl.constexpr,
):  # fmt: skip
    """Compute q' of q and k' of t.

    RECTIFY: t is the output of the key projection, and tau is written too. Otherwise t is tau.
    """
    i_b, o_row, o_f, m, b_cos, b_sin = _program(
        cos, sin, seqlen, stride_ab, stride_as, HALF, BLOCK_H, BLOCK_S
    )
    o_q = _offsets(i_b, o_row, o_f, stride_qb, stride_qs)
    o_queries = _offsets(i_b, o_row, o_f, stride_queries_b, stride_queries_s)
    for _ in range(0, nheads):
        b_a, b_b = _load_halves(q, o_q, m, HALF)
        if STRICT:
            b_square = b_a * b_a + b_b * b_b
            b_one, b_two = b_square * b_cos, b_square * b_sin
        else:
            b_one = b_a * (b_a * b_cos - b_b * b_sin)
            b_two = b_b * (b_b * b_cos + b_a * b_sin)
        _store_halves(queries, o_queries, b_one, b_two, m, HALF)
        o_q += stride_qh
        o_queries += stride_queries_h
    b_first, b_second = _key_factors(b_cos, b_sin, STRICT)
    o_t = _offsets(i_b, o_row, o_f, stride_tb, stride_ts)
    o_tau = _offsets(i_b, o_row, o_f, stride_tau_b, stride_tau_s)
    o_keys = _offsets(i_b, o_row, o_f, stride_keys_b, stride_keys_s)
    for _ in range(0, nheads_kv):
        if RECTIFY:
            b_a, b_b = _load_halves(t, o_t, m, HALF)
            # Rounded before it is multiplied: the backward makes k' again from what is stored.
            b_tau = tl.maximum((b_a + b_b) * 0.5, 0.0).to(tau.dtype.element_ty)
            tl.store(tau + o_tau, b_tau, mask=m)
            b_tau = b_tau.to(tl.float32)
        else:
            b_tau = tl.load(t + o_t, mask=m, other=0.0).to(tl.float32)
        _store_halves(keys, o_keys, b_tau * b_first, b_tau * b_second, m, HALF)
        o_t += stride_th
        o_tau += stride_tau_h
        o_keys += stride_keys_h


@triton.jit
def _coca_bwd_kernel(
    dqueries, q, dkeys, tau, dq, dt, cos, sin,
    seqlen, nheads, nheads_kv,
    stride_dqueries_b, stride_dqueries_s, stride_dqueries_h, stride_qb, stride_qs, stride_qh,
    stride_dkeys_b, stride_dkeys_s, stride_dkeys_h, stride_tau_b, stride_tau_s, stride_tau_h,
    stride_dqb, stride_dqs, stride_dqh, stride_dtb, stride_dts, stride_dth,
    stride_ab, stride_as,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, STRICT: tl.constexpr,
    RECTIFY: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of q and t from those of q' and k'.

    RECTIFY: through the rectifier. Otherwise dt is the gradient of tau, and tau is not read.
    """
    i_b, o_row, o_f, m, b_cos, b_sin = _program(
        cos, sin, seqlen, stride_ab, stride_as, HALF, BLOCK_H, BLOCK_S
    )
    o_dqueries = _offsets(i_b, o_row, o_f, stride_dqueries_b, stride_dqueries_s)
    o_q = _offsets(i_b, o_row, o_f, stride_qb, stride_qs)
    o_dq = _offsets(i_b, o_row, o_f, stride_dqb, stride_dqs)
    for _ in range(0, nheads):
        b_g, b_h = _load_halves(dqueries, o_dqueries, m, HALF)
        b_a, b_b = _load_halves(q, o_q, m, HALF)
        if STRICT:
            b_square = 2 * (b_g * b_cos + b_h * b_sin)
            b_one, b_two = b_a * b_square, b_b * b_square
        else:
            b_across = (b_h - b_g) * b_sin
            b_one = 2 * b_g * b_a * b_cos + b_across * b_b
            b_two = 2 * b_h * b_b * b_cos + b_across * b_a
        _store_halves(dq, o_dq, b_one, b_two, m, HALF)
        o_dqueries += stride_dqueries_h
        o_q += stride_qh
        o_dq += stride_dqh
    b_first, b_second = _key_factors(b_cos, b_sin, STRICT)
    o_dkeys = _offsets(i_b, o_row, o_f, stride_dkeys_b, stride_dkeys_s)
    o_tau = _offsets(i_b, o_row, o_f, stride_tau_b, stride_tau_s)
    o_dt = _offsets(i_b, o_row, o_f, stride_dtb, stride_dts)
    for _ in range(0, nheads_kv):
        b_g, b_h = _load_halves(dkeys, o_dkeys, m, HALF)
        b_dtau = b_g * b_first + b_h * b_second
        if RECTIFY:
            b_tau = tl.load(tau + o_tau, mask=m, other=0.0)
            b_dtau = tl.where(b_tau > 0, 0.5 * b_dtau, 0.0)
            _store_halves(dt, o_dt, b_dtau, b_dtau, m, HALF)
        else:
            tl.store(dt + o_dt, b_dtau.to(dt.dtype.element_ty), mask=m)
        o_dkeys += stride_dkeys_h
        o_tau += stride_tau_h
        o_dt += stride_dth


def factors(q: Tensor, t: Tensor, angles: Angles, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return q', k' and tau of q `[b, s, h, d]` and t `[b, s, h_kv, d]`, in their dtype."""
    tau = _shaped(t, t.shape[3] // 2)
    return *_launch_fwd(q, t, tau, angles, variant), tau


def factors_of_tau(q: Tensor, tau: Tensor, angles: Angles, variant: str) -> tuple[Tensor, Tensor]:
    """Return q' and k' of q `[b, s, h, d]` and tau `[b, s, h_kv, d / 2]`, in their dtype."""
    return _launch_fwd(q, tau, None, angles, variant)


def factors_bwd(
    dqueries: Tensor, dkeys: Tensor, q: Tensor, tau: Tensor, angles: Angles, variant: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and t from those of q' and k', in q.dtype."""
    dq, dt = _shaped(q, q.shape[3]), _shaped(dkeys, q.shape[3], q.dtype)
    _launch_bwd((dqueries, q, dq), (dkeys, tau, dt), angles, variant)
    return dq, dt


def queries(q: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return q' of q `[b, s, h, d]`, in q.dtype."""
    return _launch_fwd(q, None, None, angles, variant)[0]


def queries_bwd(dqueries: Tensor, q: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return the gradient of q `[b, s, h, d]` from that of q', in q.dtype."""
    dq = _shaped(q, q.shape[3])
    _launch_bwd((dqueries, q, dq), None, angles, variant)
    return dq


def keys(tau: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return k' `[b, s, h, d]` of tau `[b, s, h, d / 2]`, in tau.dtype."""
    return _launch_fwd(None, tau, None, angles, variant)[1]


def keys_bwd(dkeys: Tensor, angles: Angles, variant: str) -> Tensor:
    """Return the gradient of tau `[b, s, h, d / 2]` from that of k', in fp32."""
    dtau = _shaped(dkeys, dkeys.shape[3] // 2, torch.float32)
    _launch_bwd(None, (dkeys, None, dtau), angles, variant)
    return dtau


def _shaped(like: Tensor, features: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty contiguous tensor with the tokens and heads of `like`."""
    return torch.empty((*like.shape[:3], features), dtype=dtype or like.dtype, device=like.device)


def _launch_fwd(
    q: Tensor | None, t: Tensor | None, tau: Tensor | None, angles: Angles, variant: str
) -> tuple[Tensor, Tensor]:
    """Launch the maps to q' and k'; one of q and t may be missing, and its result is not filled.

    tau: receives tau of t; None where t is tau already.
    """
    some = q if q is not None else t
    assert some is not None
    features = 2 * angles.cos.shape[3]
    # The kernel does not touch tensors of heads that it is told not to have.
    made = some if q is None else _shaped(q, features), some if t is None else _shaped(t, features)
    q_in, t_in = (last_dim_contiguous(some if x is None else x) for x in (q, t))
    _launch(
        _coca_fwd_kernel, (q_in, t_in, *made, t_in if tau is None else tau), angles, variant,
        0 if q is None else q.shape[2], 0 if t is None else t.shape[2], tau is not None,
    )  # fmt: skip
    return made


def _launch_bwd(
    of_queries: tuple[Tensor, Tensor, Tensor] | None,
    of_keys: tuple[Tensor, Tensor | None, Tensor] | None, angles: Angles, variant: str,
) -> None:  # fmt: skip
    """Launch the adjoints of the maps to q' and k'; one of the two may be missing.

    Args:
        of_queries: the gradient of q', q, and a tensor for the gradient of q.
        of_keys: the gradient of k', tau, and a tensor for the gradient of t; without tau, of tau.
    """
    given = of_queries or of_keys
    assert given is not None
    # The kernel does not touch tensors of heads that it is told not to have.
    unused = last_dim_contiguous(given[0])
    dqueries, q, dq = of_queries or (unused,) * 3
    dkeys, tau, dt = of_keys or (unused,) * 3
    rectify = of_keys is not None and tau is not None
    tensors = (dqueries, q, dkeys, unused if tau is None else tau)
    _launch(
        _coca_bwd_kernel, (*map(last_dim_contiguous, tensors), dq, dt), angles, variant,
        0 if of_queries is None else dq.shape[2], 0 if of_keys is None else dt.shape[2], rectify,
    )  # fmt: skip


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], angles: Angles, variant: str, nheads: int,
    nheads_kv: int, rectify: bool,
) -> None:  # fmt: skip
    """Launch one of the two kernels on `[b, s, h, d]` tensors, in the order of its arguments."""
    batch, seqlen = tensors[0].shape[:2]
    half = angles.cos.shape[3]
    if not batch * seqlen:
        return
    cos, sin = last_dim_contiguous(angles.cos), last_dim_contiguous(angles.sin)
    with launch_context(tensors[0]):
        kernel[(triton.cdiv(seqlen, BLOCK_S), batch)](
            *tensors, cos, sin, seqlen, nheads, nheads_kv, *strides(*tensors),
            cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), HALF=half,
            BLOCK_H=triton.next_power_of_2(half), BLOCK_S=BLOCK_S, STRICT=variant == "strict",
            RECTIFY=rectify,
        )  # fmt: skip

"""Collinear constrained attention, dense and readable: the reference of the others.

With R_m the rotation by position m and t~ = [tau ; tau], tau = relu(mean of t's two halves), the
score of query m and key n is (arXiv:2309.08646)

    slack     <R_m q_m, q_m * R_n t~_n>      (section 2.4, eq. 10 without its constraint on q)
    strict    sum_l tau_nl |q_ml|^2 cos((m - n) theta_l)                              (eq. 17)

times softmax_scale, causal, softmax over n. Both are a product of one factor of m and one of n:
slack (q * R_m q).(R_n t~), strict (R_m [|q|^2 ; 0]).(R_n [tau ; 0]). The paper does not say how
strict holds q to its constraint; here q is unconstrained and enters by |q|^2 only.
"""

import torch
from torch import Tensor

from lcdist_kernels.coca.transform import check_variant
from lcdist_kernels.common import check_self, document_starts, wide_dtype
from lcdist_kernels.full import full_reference
from lcdist_kernels.rotary import Rotary


def coca_reference(
    q: Tensor, t: Tensor, v: Tensor, *,
    variant: str = "slack", rotary: Rotary | None = None, positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None, softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over t, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        q, v: not rotated; any float dtype. Sums are in the wider of fp32 and q.dtype.
        t: output of the key projection, before averaging and relu.
        variant: "slack" or "strict".
        positions: integers `[s]` or `[b, s]`; default: from 0 in every document. Slack depends on
            where they start.
        cu_seqlens: see `document_starts`.
        softmax_scale: default head_dim ** -0.5.

    Raises:
        ValueError: shapes do not fit, head_dim is odd, the rotary covers another head_dim, or the
            variant is unknown.
    """
    check_self(q, t, v)
    check_variant(variant, q.shape[3])
    if positions is None:
        index = torch.arange(q.shape[1])
        positions = index - document_starts(cu_seqlens, index, q.shape[1])
    out = full_reference(
        coca_queries(q, rotary, positions, variant),
        coca_keys(coca_tau(t), rotary, positions, variant),
        v.to(wide_dtype(v.dtype)),
        cu_seqlens=cu_seqlens,
        softmax_scale=softmax_scale,
    )
    return out.to(q.dtype)


def coca_queries(q: Tensor, rotary: Rotary | None, positions: Tensor, variant: str) -> Tensor:
    """Return q', like q in the wider of fp32 and q.dtype; differentiable."""
    q = q.to(wide_dtype(q.dtype))
    if variant == "slack":
        return q * _turn(q, rotary, positions)
    first, second = q.chunk(2, -1)
    square = first**2 + second**2
    return _turn(torch.cat((square, torch.zeros_like(square)), -1), rotary, positions)


def coca_tau(t: Tensor) -> Tensor:
    """Return the collinear coefficients `[..., d / 2]` of t `[..., d]`; differentiable."""
    first, second = t.chunk(2, -1)
    return (0.5 * (first + second)).relu()


def coca_keys(tau: Tensor, rotary: Rotary | None, positions: Tensor, variant: str) -> Tensor:
    """Return k' from tau `[b, s, h_kv, d / 2]`, in a wide dtype; differentiable."""
    tau = tau.to(wide_dtype(tau.dtype))
    pair = tau if variant == "slack" else torch.zeros_like(tau)
    return _turn(torch.cat((tau, pair), -1), rotary, positions)


def _turn(x: Tensor, rotary: Rotary | None, positions: Tensor) -> Tensor:
    """Rotate x, if there is a rotary."""
    return x if rotary is None else rotary.rotate(x, positions)

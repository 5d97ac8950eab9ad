"""Collinear constrained attention as a function of torch (arXiv:2309.08646), by way of q' and k'.

q' and k' are made elementwise and go to the softmax operator of full attention: "torch" is the
tiled one, with q' and k' made anew for the backward; "auto" takes torch's own fused attention where
that is exact; "reference" is the dense one.
"""

from typing import Any

import torch
from torch import Tensor

from lcdist_kernels.coca.reference import coca_reference
from lcdist_kernels.coca.transform import (
    Angles,
    angles,
    check_variant,
    collinear,
    collinear_bwd,
    keys,
    keys_bwd,
    queries,
    queries_bwd,
)
from lcdist_kernels.common import announce, check_impl, check_self, document_starts
from lcdist_kernels.full import full_attention, full_bwd, full_fwd
from lcdist_kernels.rotary import Rotary

BUILT = ("auto", "torch", "reference")


class CoCAFunction(torch.autograd.Function):
    """Self-attention in one block; q, tau, v, out and lse are all that is kept."""

    @staticmethod
    def forward(ctx: Any, q, t, v, at: Angles, variant: str, band: tuple[Tensor, Tensor], scale):
        index, starts = band
        tau = collinear(t)
        factors = queries(q, at, variant), keys(tau, at, variant)
        out, lse = full_fwd(*factors, v, index, starts, index, scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, tau, v, out, lse)
        ctx.at, ctx.variant, ctx.band, ctx.scale = at, variant, band, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, tau, v, out, lse = ctx.saved_tensors
        at, variant, (index, starts) = ctx.at, ctx.variant, ctx.band
        factors = queries(q, at, variant), keys(tau, at, variant)
        dqueries, dkeys, dv = full_bwd(dout, *factors, v, out, lse, index, starts, index, ctx.scale)
        dq = queries_bwd(dqueries, q, at, variant)
        dt = collinear_bwd(keys_bwd(dkeys, at, variant), tau)
        return dq.to(q.dtype), dt.to(q.dtype), dv.to(v.dtype), None, None, None, None


class _Factors(torch.autograd.Function):
    """(q, t) -> (q', k') in q.dtype; q and tau are all that is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, t: Tensor, at: Angles, variant: str):
        tau = collinear(t)
        ctx.save_for_backward(q, tau)
        ctx.at, ctx.variant = at, variant
        return queries(q, at, variant).to(q.dtype), keys(tau, at, variant).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, tau = ctx.saved_tensors
        dq = queries_bwd(grads[0], q, ctx.at, ctx.variant)
        dt = collinear_bwd(keys_bwd(grads[1], ctx.at, ctx.variant), tau)
        return dq.to(q.dtype), dt.to(q.dtype), None, None


def coca_attention(
    q: Tensor,
    t: Tensor,
    v: Tensor,
    *,
    variant: str = "slack",
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of q `[b, s, h, d]` over t, v `[b, s, h_kv, d]`, un-rotated; out is like q.

    t: what the projection in the key's place gives, before averaging and relu. impl: "auto",
    "torch" or "reference". The rest, and what raises ValueError, as in `coca_reference`; also an
    `impl` that is not built.
    """
    check_impl(impl, "coca", BUILT)
    if impl == "reference":
        return coca_reference(
            q,
            t,
            v,
            variant=variant,
            rotary=rotary,
            positions=positions,
            cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )
    check_self(q, t, v)
    check_variant(variant, q.shape[3])
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    at = angles(rotary, index - starts if positions is None else positions, q, q.shape[3])
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if impl == "auto" and cu_seqlens is None:
        announce("coca attention: q' and k' go to full attention, which chooses for itself")
        queries_, keys_ = _Factors.apply(q, t, at, variant)
        return full_attention(queries_, keys_, v, softmax_scale=scale, impl="auto")
    if impl == "auto":
        announce("coca attention: tiled torch, as torch's own knows no packed documents")
    return CoCAFunction.apply(q, t, v, at, variant, (index, starts), scale)

"""Collinear constrained attention as a function of torch (arXiv:2309.08646), by way of q' and k'.

q' and k' are made elementwise, anew for the backward, and go to the softmax operator of full
attention: "triton" are its kernels, "torch" the tiled one; "auto" takes the kernels on CUDA and the
tiled one on a CPU, never a library's, which would keep q' and k'; "reference" is the dense one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.coca.impl import CoCAImpl, select_coca_impl
from lcdist_kernels.coca.reference import coca_reference
from lcdist_kernels.coca.transform import (
    Angles,
    check_variant,
    collinear,
    collinear_bwd,
    rotary_angles,
)
from lcdist_kernels.common import check_impl, check_self, document_starts
from lcdist_kernels.rotary import Rotary

IMPLS = ("auto", "triton", "torch", "reference")


class Asked(NamedTuple):
    """What q' and k' are made by, which keys a query sees, and what carries it."""

    at: Angles
    variant: str
    index: Tensor
    starts: Tensor
    softmax_scale: float
    operator: CoCAImpl

    def factors(self, q: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        """q' and k'."""
        how = self.at, self.variant
        return self.operator.queries(q, *how), self.operator.keys(tau, *how)

    @property
    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `full_fwd` takes it."""
        return self.index, self.starts, self.index


class CoCAFunction(torch.autograd.Function):
    """Self-attention in one block; q, tau, v, out and lse are all that is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, t: Tensor, v: Tensor, asked: Asked):
        tau = collinear(t)
        out, lse = asked.operator.block.fwd(
            *asked.factors(q, tau), v, *asked.band, asked.softmax_scale, out_dtype=q.dtype
        )
        ctx.save_for_backward(q, tau, v, out, lse)
        ctx.asked = asked
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, tau, v, out, lse = ctx.saved_tensors
        asked: Asked = ctx.asked
        operator = asked.operator
        dqueries, dkeys, dv = operator.block.bwd(
            dout, *asked.factors(q, tau), v, out, lse, *asked.band, asked.softmax_scale
        )
        dq = operator.queries_bwd(dqueries, q, asked.at, asked.variant)
        dt = collinear_bwd(operator.keys_bwd(dkeys, asked.at, asked.variant), tau)
        return dq.to(q.dtype), dt.to(q.dtype), dv.to(v.dtype), None


def coca_attention(
    q: Tensor, t: Tensor, v: Tensor, *,
    variant: str = "slack", rotary: Rotary | None = None, positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None, softmax_scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Attention of q `[b, s, h, d]` over t, v `[b, s, h_kv, d]`, un-rotated; out is like q.

    t: what the projection in the key's place gives, before averaging and relu. q' grows as the
    square of q: the kernels' is in q's dtype, so in float16 it is infinite from |q| = 181 on.
    impl: one of `IMPLS`. The rest, and what raises ValueError, as in `coca_reference`; also an
    `impl` that is not built, and "triton" where it does not take the tensors.
    """
    check_impl(impl, "coca", IMPLS)
    if impl == "reference":
        return coca_reference(
            q, t, v, variant=variant, rotary=rotary, positions=positions, cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )  # fmt: skip
    check_self(q, t, v)
    check_variant(variant, q.shape[3])
    operator = select_coca_impl(impl, q, "coca attention")
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    at = rotary_angles(rotary, index - starts if positions is None else positions, q, q.shape[3])
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    return CoCAFunction.apply(q, t, v, Asked(at, variant, index, starts, scale, operator))

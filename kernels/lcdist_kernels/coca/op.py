"""Collinear constrained attention as a differentiable torch function (arXiv:2309.08646).

q' and k' are computed elementwise, again for the backward, and go to full attention's softmax.
"triton": the kernels. "torch": the tiled implementation. "reference": the dense one. "cudnn",
"fa3", "fa4": that library's softmax, for one document. "auto": the fastest library's for one
document in half precision on CUDA; else the kernels on CUDA and tiled torch on a CPU.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.coca.impl import CoCAImpl, select_coca_impl
from lcdist_kernels.coca.reference import coca_reference
from lcdist_kernels.coca.transform import Angles, check_variant, rotary_angles
from lcdist_kernels.common import check_impl, check_self, document_borders, resolve_scale
from lcdist_kernels.full import IMPLS
from lcdist_kernels.rotary import Rotary, document_positions, token_numbers
from lcdist_kernels.tape import kept


class CoCAContext(NamedTuple):
    """Inputs of CoCA besides tensors: angles, variant, visible keys, scale, implementation."""

    angles: Angles
    variant: str
    index: Tensor
    starts: Tensor
    softmax_scale: float
    impl: CoCAImpl

    @property
    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of `full_fwd` that say which keys are visible."""
        return self.index, self.starts, self.index


class CoCAFunction(torch.autograd.Function):
    """Self-attention over one block of keys; saves q, tau, v, out and lse."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, t: Tensor, v: Tensor, context: CoCAContext):
        queries, keys, tau = context.impl.factors(q, t, context.angles, context.variant)
        block, scale = context.impl.block, context.softmax_scale
        out, lse = kept(
            lambda: block.fwd(queries, keys, v, *context.band, scale, out_dtype=q.dtype)
        )
        ctx.save_for_backward(q, tau, v, out, lse)
        ctx.context = context
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, tau, v, out, lse = ctx.saved_tensors
        context: CoCAContext = ctx.context
        impl, maps = context.impl, (context.angles, context.variant)
        queries, keys = impl.factors_of_tau(q, tau, *maps)
        dqueries, dkeys, dv = impl.block.bwd(
            dout, queries, keys, v, out, lse, *context.band, context.softmax_scale,
            grad_dtype=queries.dtype,
        )  # fmt: skip
        dq, dt = impl.factors_bwd(dqueries, dkeys, q, tau, *maps)
        return dq, dt, dv.to(v.dtype), None


def coca_attention(
    q: Tensor, t: Tensor, v: Tensor, *,
    variant: str = "slack", rotary: Rotary | None = None, positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None, softmax_scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over t, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        t: output of the key projection, before averaging and relu.
        impl: one of `IMPLS`. The kernels' q' is in q's dtype and grows as the square of q, so in
            float16 it is infinite from |q| = 181 on.
        other: as in `coca_reference`.

    Raises:
        ValueError: as `coca_reference`; also an unknown `impl`, or tensors that kernels do not
            take.
    """
    check_impl(impl, "coca", IMPLS)
    if impl == "reference":
        return coca_reference(
            q, t, v, variant=variant, rotary=rotary, positions=positions, cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )  # fmt: skip
    check_self(q, t, v)
    check_variant(variant, q.shape[3])
    packed = cu_seqlens is not None
    what = "coca attention of packed documents" if packed else "coca attention"
    implementation = select_coca_impl(impl, q, what, packed)
    documents = document_borders(cu_seqlens, q.shape[1])
    index, starts = token_numbers(q.shape[1], documents)
    positions = document_positions(q, documents) if positions is None else positions
    angles = rotary_angles(rotary, positions, q, q.shape[3])
    scale = resolve_scale(softmax_scale, q.shape[3])
    return CoCAFunction.apply(
        q, t, v, CoCAContext(angles, variant, index, starts, scale, implementation)
    )

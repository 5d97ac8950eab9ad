"""Full causal attention as a function of torch, with its gradients and a choice of implementation.

"triton" are the kernels, "torch" the tiled operator, "reference" the dense one. "auto" takes a
library's fused attention where that is exact, since it is faster and well kept; elsewhere the
kernels on CUDA and the tiled operator on a CPU.
"""

from typing import Any

import torch
from torch import Tensor

from lcdist_kernels.common import check_impl, check_self, document_starts
from lcdist_kernels.full.impl import AttentionImpl, select_impl
from lcdist_kernels.full.library import library_for
from lcdist_kernels.full.reference import full_reference
from lcdist_kernels.rotary import Rotary

IMPLS = ("auto", "triton", "torch", "reference")


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    rotary: Rotary | None = None, positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, un-rotated; out is like q.

    positions: integers `[s]` or `[b, s]`, used by rotary alone; default: from 0 in every document.
    cu_seqlens: see `document_starts`. softmax_scale: default head_dim ** -0.5. impl: one of
    `IMPLS`. Raises ValueError where shapes do not fit, `impl` is not built, or "triton" does not
    take the tensors.
    """
    check_impl(impl, "full", IMPLS)
    if impl == "reference":
        return full_reference(
            q, k, v,
            rotary=rotary, positions=positions, cu_seqlens=cu_seqlens, softmax_scale=softmax_scale,
        )  # fmt: skip
    check_self(q, k, v)
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    library = library_for(q) if impl == "auto" and cu_seqlens is None else None
    what = "full attention" if cu_seqlens is None else "full attention of packed documents"
    operator = None if library else select_impl(impl, q, what)
    if rotary is not None:
        positions = index - starts if positions is None else positions
        q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if library is not None:
        return library(q, k, v, scale)
    return FullFunction.apply(q, k, v, index, starts, scale, operator)


class FullFunction(torch.autograd.Function):
    """Self-attention in one block; q, k, v, out and lse are all that is kept."""

    @staticmethod
    def forward(
        ctx: Any, q, k, v, index: Tensor, starts: Tensor, scale: float, operator: AttentionImpl
    ):
        out, lse = operator.fwd(q, k, v, index, starts, index, scale, out_dtype=q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.band, ctx.scale, ctx.operator = (index, starts, index), scale, operator
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = ctx.operator.bwd(
            dout, *ctx.saved_tensors, *ctx.band, ctx.scale, grad_dtype=dout.dtype
        )
        return *grads, None, None, None, None

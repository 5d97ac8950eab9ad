"""Full causal attention as a function of torch, with its gradients and a choice of implementation.

"torch" is the tiled one, "reference" the dense one. "auto" takes torch's own fused attention where
that is exact, since it is faster and well kept, and the tiled one elsewhere.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import announce, check_impl, check_self, document_starts
from lcdist_kernels.full.reference import full_reference
from lcdist_kernels.full.tiled import full_bwd, full_fwd
from lcdist_kernels.rotary import Rotary

BUILT = ("auto", "torch", "reference")


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, un-rotated; out is like q.

    positions: integers `[s]` or `[b, s]`, used by rotary alone; default: from 0 in every document.
    cu_seqlens: see `document_starts`. softmax_scale: default head_dim ** -0.5. impl: "auto",
    "torch" or "reference". Raises ValueError where shapes do not fit or `impl` is not built.
    """
    check_impl(impl, "full", BUILT)
    if impl == "reference":
        return full_reference(
            q,
            k,
            v,
            rotary=rotary,
            positions=positions,
            cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )
    check_self(q, k, v)
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    if rotary is not None:
        positions = index - starts if positions is None else positions
        q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if impl == "auto":
        if cu_seqlens is None:
            announce("full attention: torch's scaled_dot_product_attention, as it covers this case")
            return _library(q, k, v, scale)
        announce("full attention: tiled torch, as torch's own knows no packed documents")
    return FullFunction.apply(q, k, v, index, starts, scale)


def _library(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


class FullFunction(torch.autograd.Function):
    """Self-attention in one block; q, k, v, out and lse are all that is kept."""

    @staticmethod
    def forward(ctx: Any, q, k, v, index: Tensor, starts: Tensor, scale: float):
        out, lse = full_fwd(q, k, v, index, starts, index, scale)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.index, ctx.starts, ctx.scale = index, starts, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        index, starts = ctx.index, ctx.starts
        dq, dk, dv = full_bwd(dout, q, k, v, out, lse, index, starts, index, ctx.scale)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None

"""Full causal attention as a differentiable torch function with a choice of implementation.

"triton": the kernels. "torch": the tiled implementation. "reference": the dense one. "cudnn",
"fa3", "fa4": that library, for one document. "auto": the fastest library for one document in half
precision on CUDA, torch's own for one document on a CPU; else the kernels on CUDA and tiled torch
on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import check_impl, check_self, log_choice, resolve_scale
from lcdist_kernels.full.impl import AttentionImpl, select_block_impl
from lcdist_kernels.full.library_choice import FORCED
from lcdist_kernels.full.reference import full_reference
from lcdist_kernels.full.torch_cpu import TORCH_CPU_IMPL, takes
from lcdist_kernels.rotary import Rotary, rotate_self
from lcdist_kernels.tape import kept

IMPLS = ("auto", *FORCED, "triton", "torch", "reference")


def full_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    rotary: Rotary | None = None, positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        q, k, v: not rotated.
        positions: integers `[s]` or `[b, s]`, used by rotary only; default: from 0 in every
            document.
        cu_seqlens: see `document_starts`.
        softmax_scale: default head_dim ** -0.5.
        impl: one of `IMPLS`.

    Raises:
        ValueError: shapes do not fit, `impl` is unknown, or it does not take the tensors.
    """
    check_impl(impl, "full", IMPLS)
    if impl == "reference":
        return full_reference(
            q, k, v, rotary=rotary, positions=positions, cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )  # fmt: skip
    check_self(q, k, v)
    packed = cu_seqlens is not None
    what = "full attention of packed documents" if packed else "full attention"
    on_cpu = impl == "auto" and not packed and not q.is_cuda
    implementation = None if on_cpu else select_block_impl(impl, q, what, packed)
    q, k, index, starts = rotate_self(q, k, rotary, positions, cu_seqlens)
    scale = resolve_scale(softmax_scale, q.shape[3])
    if implementation is None:
        log_choice("full attention: torch's scaled_dot_product_attention")
        if not takes(q, k, v, scale):
            return _torch_attention(q, k, v, scale)
        implementation = TORCH_CPU_IMPL
    return FullFunction.apply(q, k, v, index, starts, scale, implementation)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Return torch's own causal attention, whatever it is made of."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)


class FullFunction(torch.autograd.Function):
    """Self-attention over one block of keys; saves q, k, v, out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q, k, v, index: Tensor, starts: Tensor, scale: float, impl: AttentionImpl
    ):
        band = (index, starts, index)
        out, lse = kept(lambda: impl.fwd(q, k, v, *band, scale, out_dtype=q.dtype))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.band, ctx.scale, ctx.impl = band, scale, impl
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = ctx.impl.bwd(dout, *ctx.saved_tensors, *ctx.band, ctx.scale, grad_dtype=dout.dtype)
        return *grads, None, None, None, None

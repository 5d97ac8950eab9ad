"""Tensorized attention as a differentiable torch function with a choice of implementation.

"triton": the kernels. "torch": the tiled implementation. "reference": the dense one. "auto": the
kernels on CUDA, tiled torch on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import check_impl, check_self, document_starts, resolve_scale, wide_dtype
from lcdist_kernels.full import full_attention
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.tensorized.grid import ModeGrid, check_bias, check_documents, initial_bias
from lcdist_kernels.tensorized.impl import TensorizedImpl, select_tensorized_impl
from lcdist_kernels.tensorized.reference import tensorized_reference
from lcdist_kernels.tensorized.tiled import Branch, ModeRotary, coarsest_branch, fine_branch

IMPLS = ("auto", "triton", "torch", "reference")


def tensorized_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    grid: ModeGrid, branch_bias: Tensor | None = None, rotary: Rotary | None = None,
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Arguments as in `tensorized_reference`; impl: one of `IMPLS`. Any length is legal. Except with
    impl = "reference", a document must start at a multiple of the product of modes.

    Raises:
        ValueError: a document starts elsewhere, shapes do not fit, `impl` is unknown, or kernels do
            not take the tensors.
    """
    check_impl(impl, "tensorized", IMPLS)
    if impl == "reference":
        return tensorized_reference(
            q, k, v, grid=grid, branch_bias=branch_bias, rotary=rotary, positions=positions,
            cu_seqlens=cu_seqlens, softmax_scale=softmax_scale,
        )  # fmt: skip
    check_self(q, k, v)
    bias = initial_bias(grid.modes, q.shape[2]) if branch_bias is None else branch_bias
    check_bias(bias, grid, q.shape[2])
    if not grid.modes:
        return full_attention(
            q, k, v, rotary=rotary, positions=positions, cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale, impl=impl,
        )  # fmt: skip
    implementation = select_tensorized_impl(impl, q, "tensorized attention")
    seqlen = q.shape[1]
    padding = -seqlen % grid.block
    index = torch.arange(seqlen + padding)
    starts = document_starts(cu_seqlens, index, seqlen)
    # Padding continues the last document, also past an empty one.
    starts[seqlen:] = starts[seqlen - 1]
    check_documents(starts, grid)
    positions = (index - starts)[:seqlen] if positions is None else positions
    positions = F.pad(positions, (0, padding))
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x for x in (q, k, v))
    scale = resolve_scale(softmax_scale, q.shape[3])
    bias = bias.to(q.device, wide_dtype(q.dtype))
    mode_rotary = ModeRotary(grid, rotary, positions, scale)
    out = TensorizedFunction.apply(q, k, v, bias, mode_rotary, index, starts, implementation)
    return out[:, :seqlen]


def branches(index: Tensor, starts: Tensor, grid: ModeGrid) -> list[Branch]:
    """Return all branches of a whole sequence, finest first."""
    fine = [fine_branch(mode, index, starts, index, grid) for mode in range(len(grid.modes))]
    return [*fine, coarsest_branch(starts, grid)]


class TensorizedFunction(torch.autograd.Function):
    """Attention over whole blocks; saves q, k, v, the U_j, out, lse and the lambda_j."""

    @staticmethod
    def forward(
        ctx: Any, q, k, v, bias: Tensor, mode_rotary: ModeRotary, index: Tensor, starts: Tensor,
        impl: TensorizedImpl,
    ) -> Tensor:  # fmt: skip
        values, lambdas, partial = [v], [], None
        for mode, branch in enumerate(branches(index, starts, mode_rotary.grid)):
            qku = (mode_rotary.rotate(q, mode), mode_rotary.rotate(k, mode), values[-1])
            partial, u_next, hop_lse = impl.mode_fwd(qku, branch, mode, mode_rotary, partial, bias)
            if u_next is not None:
                values.append(u_next)
                lambdas.append(hop_lse)
        assert partial is not None, "there is always a branch"
        out, lse = partial.out.to(q.dtype), partial.lse
        ctx.save_for_backward(q, k, out, lse, bias, *values, *lambdas)
        ctx.mode_rotary, ctx.index, ctx.starts, ctx.impl = mode_rotary, index, starts, impl
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, out, lse, bias, *saved = ctx.saved_tensors
        mode_rotary, impl = ctx.mode_rotary, ctx.impl
        hops = len(mode_rotary.grid.modes)
        values, lambdas = saved[: hops + 1], saved[hops + 1 :]
        delta = impl.row_delta(dout, out)
        dq, dk = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k))
        dbias, du_next = torch.zeros_like(bias), None
        for mode, branch in reversed(
            list(enumerate(branches(ctx.index, ctx.starts, mode_rotary.grid)))
        ):
            qku = (mode_rotary.rotate(q, mode), mode_rotary.rotate(k, mode), values[mode])
            row_stats = (lse if mode == 0 else lse - bias[mode - 1, :, None], delta)
            hop_saved = None if du_next is None else (du_next, values[mode + 1], lambdas[mode])
            grads = impl.mode_bwd(dout, qku, row_stats, branch, hop_saved, mode, mode_rotary)
            if mode:
                dbias[mode - 1] = grads.dlogits.sum((0, 2))
            dq += mode_rotary.rotate_back(grads.dq, mode)
            dk += mode_rotary.rotate_back(grads.dk, mode)
            du_next = grads.du
        assert du_next is not None
        return dq.to(q.dtype), dk.to(k.dtype), du_next.to(q.dtype), dbias, None, None, None, None

"""Tensorized attention as a function of torch, with its gradients and a choice of implementation.

"triton" are the kernels, "torch" the tiled operators, "reference" the dense one; "auto" takes the
kernels on CUDA and the tiled operators on a CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import check_impl, check_self, document_starts, wide_dtype
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
    """As `tensorized_reference`; impl: one of `IMPLS`.

    Any length is legal; a document must start at a multiple of the product of modes, except with
    impl = "reference". Raises ValueError where one does not, where shapes do not fit, `impl` is not
    built, or "triton" does not take the tensors.
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
    operator = select_tensorized_impl(impl, q, "tensorized attention")
    seqlen = q.shape[1]
    padding = -seqlen % grid.block
    index = torch.arange(seqlen + padding)
    starts = document_starts(cu_seqlens, index, seqlen)
    # An empty document at the end is nobody's: padding continues the one before.
    starts[seqlen:] = starts[seqlen - 1]
    check_documents(starts, grid)
    positions = (index - starts)[:seqlen] if positions is None else positions
    positions = F.pad(positions, (0, padding))
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x for x in (q, k, v))
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    bias = bias.to(q.device, wide_dtype(q.dtype))
    turning = ModeRotary(grid, rotary, positions, scale)
    out = TensorizedFunction.apply(q, k, v, bias, turning, index, starts, operator)
    return out[:, :seqlen]


def branches(index: Tensor, starts: Tensor, grid: ModeGrid) -> list[Branch]:
    """All branches of a whole sequence, finest first."""
    fine = [fine_branch(mode, index, starts, index, grid) for mode in range(len(grid.modes))]
    return [*fine, coarsest_branch(starts, grid)]


class TensorizedFunction(torch.autograd.Function):
    """A sequence of whole blocks; q, k, v, the U_j, out, lse and the lambda_j are kept."""

    @staticmethod
    def forward(
        ctx: Any, q, k, v, bias: Tensor, turning: ModeRotary, index: Tensor, starts: Tensor,
        operator: TensorizedImpl,
    ) -> Tensor:  # fmt: skip
        values, lambdas, done = [v], [], None
        for mode, branch in enumerate(branches(index, starts, turning.grid)):
            qku = (turning.rotate(q, mode), turning.rotate(k, mode), values[-1])
            done, u, lam = operator.mode_fwd(qku, branch, mode, turning, done, bias)
            if u is not None:
                values.append(u)
                lambdas.append(lam)
        assert done is not None, "there is always a branch"
        out, lse = done.out.to(q.dtype), done.lse
        ctx.save_for_backward(q, k, out, lse, bias, *values, *lambdas)
        ctx.turning, ctx.index, ctx.starts, ctx.operator = turning, index, starts, operator
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, out, lse, bias, *kept = ctx.saved_tensors
        turning, operator = ctx.turning, ctx.operator
        hops = len(turning.grid.modes)
        values, lambdas = kept[: hops + 1], kept[hops + 1 :]
        delta = operator.row_delta(dout, out)
        dq, dk = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k))
        dbias, g = torch.zeros_like(bias), None
        for mode, branch in reversed(
            list(enumerate(branches(ctx.index, ctx.starts, turning.grid)))
        ):
            qku = (turning.rotate(q, mode), turning.rotate(k, mode), values[mode])
            rows = (lse if mode == 0 else lse - bias[mode - 1, :, None], delta)
            hopped = None if g is None else (g, values[mode + 1], lambdas[mode])
            grads = operator.mode_bwd(dout, qku, rows, branch, hopped, mode, turning)
            if mode:
                dbias[mode - 1] = grads.dlogits.sum((0, 2))
            dq += turning.rotate_back(grads.dq, mode)
            dk += turning.rotate_back(grads.dk, mode)
            g = grads.du
        assert g is not None
        return dq.to(q.dtype), dk.to(k.dtype), g.to(q.dtype), dbias, None, None, None, None

"""Tensorized attention as a differentiable torch function; see `common.check_impl`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import (
    check_impl,
    check_self,
    document_borders,
    resolve_scale,
    wide_dtype,
)
from lcdist_kernels.full import full_attention
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.tape import kept
from lcdist_kernels.tensorized.grid import ModeGrid, check_bias
from lcdist_kernels.tensorized.impl import TensorizedImpl, select_tensorized_impl
from lcdist_kernels.tensorized.reference import tensorized_reference
from lcdist_kernels.tensorized.sweeps import WholePlan, initial_bias_for, make_plan, mode_angles
from lcdist_kernels.tensorized.tiled import ModeRotary, Saved
from lcdist_kernels.tile_ranges import device_stream

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
    bias = initial_bias_for(q, grid.modes) if branch_bias is None else branch_bias
    check_bias(bias, grid, q.shape[2])
    if not grid.modes:
        return full_attention(
            q, k, v, rotary=rotary, positions=positions, cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale, impl=impl,
        )  # fmt: skip
    implementation = select_tensorized_impl(impl, q, "tensorized attention")
    seqlen = q.shape[1]
    padding = -seqlen % grid.block
    key = (grid, seqlen, document_borders(cu_seqlens, seqlen))
    plan, angles = make_plan(*key), ()
    if positions is not None:
        positions = F.pad(positions, (0, padding))
    elif rotary is not None:
        angles = mode_angles(*key, device_stream(q))
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) if padding else x for x in (q, k, v))
    scale = resolve_scale(softmax_scale, q.shape[3])
    bias = bias.to(q.device, wide_dtype(q.dtype))
    mode_rotary = ModeRotary(
        grid, rotary, plan.positions if positions is None else positions, scale, angles
    )
    out = TensorizedFunction.apply(q, k, v, bias, mode_rotary, plan, implementation)
    return out[:, :seqlen]


class TensorizedFunction(torch.autograd.Function):
    """Attention over whole blocks; saves q, k, v, the U_j, out, lse and the lambda_j."""

    @staticmethod
    def forward(
        ctx: Any, q, k, v, bias: Tensor, mode_rotary: ModeRotary, plan: WholePlan,
        impl: TensorizedImpl,
    ) -> Tensor:  # fmt: skip
        def attend() -> list[Tensor]:
            out, lse, values, lambdas = impl.whole_fwd((q, k, v), bias, plan, mode_rotary)
            return [out, lse, *values[1:], *lambdas]

        out, lse, *rest = kept(attend)
        ctx.save_for_backward(q, k, out, lse, bias, v, *rest)
        ctx.mode_rotary, ctx.plan, ctx.impl = mode_rotary, plan, impl
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, out, lse, bias, *saved = ctx.saved_tensors
        hops = len(ctx.mode_rotary.grid.modes)
        saved = Saved(out, lse, saved[: hops + 1], saved[hops + 1 :])
        grads = ctx.impl.whole_bwd(dout, (q, k), saved, bias, ctx.plan, ctx.mode_rotary)
        return *grads, None, None, None

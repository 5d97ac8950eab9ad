"""The second half of a layer, some tokens at a time (sequence tiling, arXiv:2506.13996):

    y = x + W2 z        z = silu(g) * u        (g, u) = W1 norm(x)

Every token goes through it alone, so forward and backward go tile by tile, and of all tokens there
is x, y and their gradients and nothing else: backward makes each tile's z again. Gradients of
parameters are summed over the tiles, in fp32 or wider, and given to autograd once (`recompute.py`
says why). Under sequence parallelism a tile is some tokens of every rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.memory.recompute import gradients, randomness, repeating, trained
from megatron.core.tensor_parallel import RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(g) * u for gate_up = (g, u) `[.., 2 n]`, arXiv:2002.05202; keeps gate_up alone.

    The numbers are Megatron's, whose own keeps silu(g), a copy of u and the memory of gate_up.
    """
    return _SwiGLU.apply(gate_up)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        [gate_up], [dout] = ctx.saved_tensors, grads
        gate, up = gate_up.chunk(2, -1)
        both = torch.empty_like(gate_up)
        dgate, dup = both.chunk(2, -1)
        torch.mul(F.silu(gate), dout, out=dup)
        torch.ops.aten.silu_backward.grad_input(dout * up, gate, grad_input=dgate)
        return both


@dataclass(frozen=True)
class MLPBlock:
    """Norm, MLP and residual of one layer: x `[s, b, h]` to y, token by token."""

    norm: nn.Module
    mlp: MLP

    @property
    def parts(self) -> int:
        """How many ranks' tokens meet between the two products."""
        config = self.mlp.config
        return config.tensor_model_parallel_size if config.sequence_parallel else 1

    def __call__(self, x: Tensor) -> Tensor:
        """y, through the layer's modules, whatever they are."""
        out, bias = self.mlp.linear_fc2(self.inner(x))
        assert bias is None
        return x + out

    def inner(self, x: Tensor) -> Tensor:
        """z `[s, b, ffn / tp]`, of all ranks' tokens under sequence parallelism."""
        gate_up, bias = self.mlp.linear_fc1(self.norm(x))
        assert bias is None
        return swiglu(gate_up)

    def backward(self, x: Tensor, params: Sequence[Tensor], dout: Tensor) -> list[Tensor | None]:
        """Gradients of x, where it asks for one, and of the parameters."""
        fc2 = self.mlp.linear_fc2
        if type(fc2) is not RowParallelLinear:
            with torch.enable_grad():
                out = self(x)
            return gradients(out, [x, *params], dout)
        # What a plain product does in backward is known without making its result again, which
        # would be a ninth of the MLP's operations, and sending it.
        with torch.enable_grad():
            z = self.inner(x)
        whole = dout
        if self.parts > 1:
            whole = gather_from_sequence_parallel_region(dout, group=self.mlp.tp_group)
        dz = whole @ fc2.weight
        found: list[Tensor | None] = [None] * (1 + len(params))
        if z.requires_grad:
            found = gradients(z, [x, *params], dz)
        del dz
        for number, parameter in enumerate(params):
            if parameter is fc2.weight:
                found[1 + number] = whole.flatten(0, 1).t() @ z.detach().flatten(0, 1)
        if found[0] is not None:
            found[0] = found[0] + dout
        return found


def sequence_tiled(half: MLPBlock, x: Tensor, tokens: int, unread: bool = False) -> Tensor:
    """y for x `[s, b, h]`, `tokens` of all ranks' tokens at a time.

    unread: nobody will look at y, of which only the gradient is wanted; it is left unwritten.
    """
    step = max(1, tokens // (x.shape[1] * half.parts))
    return _Tiled.apply(half, step, unread, x, *trained(half.norm, half.mlp))


class _Tiled(Function):
    """x `[s, b, h]`, `step` of this rank's s at once."""

    @staticmethod
    def forward(
        ctx: Any, half: MLPBlock, step: int, unread: bool, x: Tensor, *params: Tensor
    ) -> Tensor:
        ctx.half, ctx.step, ctx.randomness = half, step, randomness()
        ctx.params = params
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        for rows in _steps(len(x), step) if not unread else ():
            out[rows] = half(x[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [x], [dout], params = ctx.saved_tensors, grads, ctx.params
        wanted = ctx.needs_input_grad[3]
        dx = torch.empty_like(x) if wanted else None
        sums: list[Tensor | None] = [None] * len(params)
        with repeating(ctx.randomness):
            for rows in _steps(len(x), ctx.step):
                tile = x[rows].detach().requires_grad_(wanted)
                [dtile, *found] = ctx.half.backward(tile, params, dout[rows])
                if dx is not None:
                    assert dtile is not None
                    dx[rows] = dtile
                sums = [_plus(total, more) for total, more in zip(sums, found, strict=True)]
                # Or they would live while the next tile is made.
                del found, dtile, tile
        of_params = [
            None if total is None else total.to(p.dtype)
            for total, p in zip(sums, params, strict=True)
        ]
        return None, None, None, dx, *of_params


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if more is None:
        return total
    if total is None:
        return more.to(torch.promote_types(more.dtype, torch.float32))
    return total.add_(more)


def _steps(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))

"""Norm, MLP and residual of a layer in tiles of tokens (sequence tiling, arXiv:2506.13996):

    y = x + W2 z        z = silu(g) * u        (g, u) = W1 norm(x)

Tokens are independent here, so forward and backward run tile by tile. Only x, y and their
gradients exist for all tokens; backward recomputes each tile's g and u. Weight gradients go
into `main_grad` tile by tile (`gradient.py`); those of norms are summed over tiles in fp32 or wider
and returned to autograd once (see `recompute.py`). Under sequence
parallelism a tile contains tokens of every rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.gradient import accumulate, is_placeholder
from lcdist.model.linear import Row
from lcdist.model.memory.recompute import gradients, replay_rng, rng_states, trained
from lcdist.model.norm import RMSNorm
from lcdist_kernels.swiglu import swiglu, swiglu_gradient_
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.mlp import MLP


@dataclass(frozen=True)
class MLPBlock:
    """Norm, MLP and residual of one layer: x `[s, b, h]` to y of the same shape."""

    norm: RMSNorm
    mlp: MLP

    @property
    def parts(self) -> int:
        """Number of ranks whose tokens are gathered between the two products."""
        config = self.mlp.config
        return config.tensor_model_parallel_size if config.sequence_parallel else 1

    def __call__(self, x: Tensor) -> Tensor:
        """Return y."""
        residual, gate_up = self.first_product(x)
        out, bias = self.mlp.linear_fc2(swiglu(gate_up))
        assert bias is None
        return residual + out

    def first_product(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x, whose gradient meets that of its norm, and gate and up `[s, b, 2 ffn / tp]`.

        They have all ranks' tokens under sequence parallelism.
        """
        x, normed, _ = self.norm.add(x, None)
        gate_up, bias = self.mlp.linear_fc1(normed)
        assert bias is None
        return x, gate_up

    def backward(self, x: Tensor, params: Sequence[Tensor], dout: Tensor) -> list[Tensor | None]:
        """Return the gradients of x and of `params`, as `recompute.gradients` does."""
        fc2 = self.mlp.linear_fc2
        if type(fc2) is not Row:
            with torch.enable_grad():
                out = self(x)
            return gradients([out], [x, *params], [dout])
        # The backward of a plain product does not need its output. Skipping it saves a ninth of the
        # MLP's operations and a collective.
        with torch.enable_grad():
            residual, gate_up = self.first_product(x)
        whole_dout = dout
        if self.parts > 1:
            whole_dout = gather_from_sequence_parallel_region(dout, group=self.mlp.tp_group)
        dz, trains = whole_dout @ fc2.weight, fc2.weight.requires_grad
        dgate_up, z = swiglu_gradient_(gate_up.detach(), dz, again=trains)
        del dz
        dfc2 = None if z is None else accumulate(fc2.weight, whole_dout, z)
        del z
        grads = gradients([residual, gate_up], [x, *params], [dout, dgate_up])
        for number, parameter in enumerate(params):
            if parameter is fc2.weight:
                grads[1 + number] = dfc2
        return grads


def sequence_tiled(block: MLPBlock, x: Tensor, tokens: int, skip_output: bool = False) -> Tensor:
    """Return y for x `[s, b, h]`, computed in tiles.

    Args:
        block: the layers to apply.
        x: this rank's tokens.
        tokens: size of a tile, counting the tokens of all ranks.
        skip_output: return y uninitialised, for a caller that needs its gradient function alone.
    """
    step = max(1, tokens // (x.shape[1] * block.parts))
    return _Tiled.apply(block, step, skip_output, x, *trained(block.norm, block.mlp))


class _Tiled(Function):
    """Apply an MLPBlock to x `[s, b, h]`, `step` positions of s at a time."""

    @staticmethod
    def forward(
        ctx: Any, block: MLPBlock, step: int, skip_output: bool, x: Tensor, *params: Tensor
    ) -> Tensor:
        ctx.block, ctx.step, ctx.rng_states = block, step, rng_states()
        ctx.params = params
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        for rows in _steps(len(x), step) if not skip_output else ():
            out[rows] = block(x[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [x], [dout], params = ctx.saved_tensors, grads, ctx.params
        needs_dx = ctx.needs_input_grad[3]
        dx = torch.empty_like(x) if needs_dx else None
        sums: list[Tensor | None] = [None] * len(params)
        with replay_rng(ctx.rng_states):
            for rows in _steps(len(x), ctx.step):
                tile = x[rows].detach().requires_grad_(needs_dx)
                [dtile, *grads_of_tile] = ctx.block.backward(tile, params, dout[rows])
                if dx is not None:
                    assert dtile is not None
                    dx[rows] = dtile
                sums = [_add(total, g) for total, g in zip(sums, grads_of_tile, strict=True)]
                # Free them before the next tile is computed.
                del grads_of_tile, dtile, tile
        dparams = [
            None if total is None else total.to(p.dtype)
            for total, p in zip(sums, params, strict=True)
        ]
        return None, None, None, dx, *dparams


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Add a gradient to a sum in fp32 or wider; None stands for 0."""
    if grad is None:
        return total
    if is_placeholder(grad):
        return grad
    if total is None:
        return grad.to(torch.promote_types(grad.dtype, torch.float32))
    return total.add_(grad)


def _steps(count: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, count, step))

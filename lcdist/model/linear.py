"""Megatron's parallel linears, whose weight gradients go where `gradient.accumulate` puts them.

Messages and their order are Megatron's (arXiv:1909.08053, arXiv:2205.05198): in backward, the
gather of x travels while dx is computed, and the sum of dx over ranks while dW is.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.model.gradient import accumulate
from lcdist_kernels.swiglu import swiglu, swiglu_gradient_
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class Column(ColumnParallelLinear):
    """Megatron's column-parallel linear."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: A002
        return _product(input, weight, **options)


class Row(RowParallelLinear):
    """Megatron's row-parallel linear.

    Given gate and up, twice as wide as its input, it applies SwiGLU first. Then it keeps gate and
    up for backward, which makes SwiGLU's result again.
    """

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: A002
        if input.shape[-1] == 2 * self.input_size_per_partition:
            assert options["bias"] is None
            return _GatedProduct.apply(input, weight)
        return _product(input, weight, **options)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None,
    **unused: Any,
) -> Tensor:
    """Return x W^T + bias `[s, b, out]`; the arguments are Megatron's.

    Args:
        x: `[s, b, in]`.
        weight: `[out, in]`.
        bias: `[out]` or None.
        allreduce_dgrad: sum dx over the ranks.
        sequence_parallel: x holds this rank's tokens; the output is of all ranks' tokens.
        tp_group: the tensor-parallel ranks.
        unused: other settings of Megatron's, which are off.
    """
    return _Product.apply(
        x,
        weight,
        bias,
        tp_group if sequence_parallel else None,
        tp_group if allreduce_dgrad else None,
    )


class _Product(Function):
    """x W^T + bias with the messages of tensor parallelism.

    gather: the ranks whose tokens are gathered first; None: x holds all of them.
    reduce: the ranks over which dx is summed; None: it is complete.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gather: dist.ProcessGroup | None,
        reduce: dist.ProcessGroup | None,
    ) -> Tensor:
        # The parameter itself: saved-tensor hooks would bring back another object.
        ctx.weight, ctx.gather, ctx.reduce = weight, gather, reduce
        ctx.save_for_backward(*([x] if weight.requires_grad else []))
        whole, work = _gathered(x, gather)
        if work is not None:
            work.wait()
        out = torch.matmul(whole, weight.t())
        return out if bias is None else out + bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [dy] = grads
        needs_dx, needs_dw, needs_bias = ctx.needs_input_grad[:3]
        whole = arrival = dx = dw = departure = None
        if needs_dw:
            whole, arrival = _gathered(ctx.saved_tensors[0], ctx.gather)
        if needs_dx:
            dx, departure = _reduced(dy.matmul(ctx.weight), ctx.gather, ctx.reduce)
        if whole is not None:
            if arrival is not None:
                arrival.wait()
            dw = accumulate(ctx.weight, dy, whole)
        dbias = dy.flatten(0, -2).sum(0) if needs_bias else None
        if departure is not None:
            departure.wait()
        return dx, dw, dbias, None, None


class _GatedProduct(Function):
    """swiglu(gate_up) W^T of a row-parallel weight, whose caller sums over the ranks."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.weight, ctx.overwritten = weight, False
        ctx.save_for_backward(gate_up)
        return torch.matmul(swiglu(gate_up), weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Saved-tensor hooks take autograd's own check away.
        if ctx.overwritten:
            raise RuntimeError("gate and up were overwritten by an earlier backward")
        [dy], [gate_up] = grads, ctx.saved_tensors
        ctx.overwritten, needs_dw = True, ctx.needs_input_grad[1]
        dz = dy.matmul(ctx.weight)
        dgate_up, z = swiglu_gradient_(gate_up.detach(), dz, again=needs_dw)
        return dgate_up, None if z is None else accumulate(ctx.weight, dy, z)


def _gathered(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Any]:
    """Return all ranks' tokens `[s, b, in]` and the message that brings them, None without one."""
    if group is None:
        return x, None
    whole = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    return whole, dist.all_gather_into_tensor(whole, x.contiguous(), group=group, async_op=True)


def _reduced(
    dx: Tensor, scatter: dist.ProcessGroup | None, reduce: dist.ProcessGroup | None
) -> tuple[Tensor, Any]:
    """Return dx summed over ranks, this rank's tokens of it, and the message under way."""
    if scatter is not None:
        part = dx.new_empty(dx.shape[0] // scatter.size(), *dx.shape[1:])
        return part, dist.reduce_scatter_tensor(part, dx, group=scatter, async_op=True)
    if reduce is not None:
        return dx, dist.all_reduce(dx, group=reduce, async_op=True)
    return dx, None

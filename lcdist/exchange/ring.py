"""ring: every rank's block visits every rank; the next hop is in flight during each visit.

After i hops rank r holds the block of rank r - i. `ring` is differentiable. Its adjoint is the
same lap in reverse: each gradient collects every rank's share on its way to the owner.
`ring_with_gradients` is the lap of a hand-written backward pass. Gradients follow their blocks and
reach the owner one hop after the last visit (Ring Attention, arXiv:2310.01889).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from lcdist.exchange.debug import Label
from lcdist.exchange.p2p import Group, Handle, group_rank, group_size, post_exchange, wide_dtype


def ring(x: Tensor, group: Group) -> Iterator[tuple[int, Tensor]]:
    """Yield `(owner, block)` for every rank's `x`: this rank's first, then rank - 1's, and so on.

    Every rank must finish the lap. A rank that needs gradients must use at least its own block,
    because the whole lap is one autograd node; all blocks are then kept. Without gradients two
    blocks are kept, the current and the next.

    Args:
        x: this rank's block, of the same shape and dtype on all ranks; strides are free.
        group: context-parallel group.
    """
    if group_size(group) == 1:
        return iter([(0, x)])
    if torch.is_grad_enabled() and x.requires_grad:
        own, *buffers = _RingOp.apply(x, group)
        return _rotate(own, group, iter(buffers))
    return _rotate(x, group, (_empty_like(x) for _ in range(group_size(group) - 1)))


def _empty_like(x: Tensor) -> Tensor:
    """Return a contiguous buffer of x's shape, whatever its strides."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _post_hop(group: Group, label: Label, x: Tensor, out: Tensor, step: int) -> Handle:
    """Post `x` to rank + step and a receive into `out` from rank - step."""
    n, rank = group_size(group), group_rank(group)
    return post_exchange(group, label, [((rank + step) % n, x)], [((rank - step) % n, out)])


def _rotate(own: Tensor, group: Group, buffers: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield all blocks with their owners, receiving each into the next of `buffers`."""
    n, rank = group_size(group), group_rank(group)
    block, sent = own, own.detach().contiguous()
    for i in range(n - 1):
        next_block = next(buffers)
        label = Label("ring", f"hop {i + 1} of {n - 1}", tuple(sent.shape), sent.dtype)
        hop = _post_hop(group, label, sent, next_block.detach(), 1)
        yield (rank - i) % n, block
        hop.wait()
        block, sent = next_block, next_block.detach()
    yield (rank + 1) % n, block


class _RingOp(Function):
    """The lap as one autograd node: its outputs are the buffers that the hops fill later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.group = group
        return x.view_as(x), *(_empty_like(x) for _ in range(group_size(group) - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        last = len(grads) - 1
        total = _copy(grads[last], wide_dtype(grads[last].dtype))
        for i in range(last - 1, -1, -1):
            label = Label("ring", f"backward hop {last - i}", tuple(total.shape), total.dtype)
            buffer = _empty_like(total)
            _post_hop(ctx.group, label, total, buffer, -1).wait()
            total = buffer.add_(grads[i])
        return total.to(grads[0].dtype), None


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy in `dtype` that may be modified."""
    return x.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)


@dataclass(frozen=True)
class Visit:
    """One block on its visit to this rank.

    Args:
        owner: rank that owns the block.
        block: the block.
        add_gradient: adds this rank's gradient of the block, of the block's shape; at most once
            per visit. An earlier call hides more of the gradient's transfer.
    """

    owner: int
    block: Tensor
    add_gradient: Callable[[Tensor], None]


class GradRing:
    """The lap of `ring_with_gradients`: iterate it once, then call `result()`."""

    def __init__(self, x: Tensor, group: Group) -> None:
        self._x, self._group = x.detach(), group
        self._hop: Handle | None = None
        self._total: Tensor | None = None
        self._num_visits = self._num_sums = 0

    def __iter__(self) -> Iterator[Visit]:
        assert self._num_visits == 0, "a lap is iterated once"
        for owner, block in ring(self._x, self._group):
            self._num_visits += 1
            yield Visit(owner, block, partial(self._add_gradient, self._num_visits))
            if self._num_sums < self._num_visits:
                self._add_gradient(self._num_visits, None)

    def _add_gradient(self, visit: int, grad: Tensor | None) -> None:
        """Add `grad` to the running sum of the visiting block and post the sum's next hop."""
        assert self._num_sums < visit == self._num_visits, (
            "a visit takes one gradient, before the next"
        )
        assert grad is None or grad.shape == self._x.shape, "not of the block's shape"
        with torch.no_grad():
            total = self._sum(grad)
            if group_size(self._group) == 1:
                self._total = total
            else:
                self._total = _empty_like(total)
                label = Label("ring", f"gradient {self._num_sums}", tuple(total.shape), total.dtype)
                self._hop = _post_hop(self._group, label, total, self._total, 1)
        self._num_sums += 1

    def _sum(self, grad: Tensor | None) -> Tensor:
        if self._total is None:
            if grad is None:
                dtype = wide_dtype(self._x.dtype)
                return torch.zeros(self._x.shape, dtype=dtype, device=self._x.device)
            return _copy(grad, wide_dtype(self._x.dtype))
        self._wait()
        return self._total if grad is None else self._total.add_(grad)

    def _wait(self) -> None:
        if self._hop is not None:
            self._hop.wait()
            self._hop = None

    def result(self) -> Tensor:
        """Return the sum of all ranks' gradients of this rank's `x`, in the wider of fp32, x.dtype.

        All visits must be over.
        """
        assert self._num_sums == group_size(self._group), "the lap is not finished"
        self._wait()
        assert self._total is not None
        return self._total


def ring_with_gradients(x: Tensor, group: Group) -> GradRing:
    """Return a lap of blocks, as in `ring`, whose gradients travel with them to the owners.

    Call `visit.add_gradient(grad)` for every visit of the lap, then `lap.result()`. Every rank must
    finish the lap. A visit without `add_gradient` adds nothing. Not differentiable.
    """
    return GradRing(x, group)

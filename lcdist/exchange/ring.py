"""ring: every rank's block visits every rank, the next hop under way while one is computed with.

After i hops rank r holds the block of rank r - i. `ring` is differentiable: its adjoint is the lap
in reverse, each gradient collecting what every rank adds until it is home. `ring_with_gradients` is
the lap of a hand-written backward: gradients follow their blocks and are home one hop after the
last visit (Ring Attention, arXiv:2310.01889).
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
from lcdist.exchange.p2p import Group, Handle, group_rank, group_size, post, wider


def ring(x: Tensor, group: Group) -> Iterator[tuple[int, Tensor]]:
    """Yields `(owner, block)` for every rank's `x`: the own first, then rank - 1's, rank - 2's, ...

    x: this rank's block, of any shape and dtype, the same on all ranks; strides are free. Every
    rank must finish the lap, and must use at least its own block if it wants gradients: the whole
    lap is one autograd node. Holds all blocks then; without gradients two, the current and the
    next.
    """
    if group_size(group) == 1:
        return iter([(0, x)])
    if torch.is_grad_enabled() and x.requires_grad:
        own, *arriving = _Lap.apply(x, group)
        return _travel(own, group, iter(arriving))
    return _travel(x, group, (_like(x) for _ in range(group_size(group) - 1)))


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _hop(group: Group, label: Label, x: Tensor, out: Tensor, step: int) -> Handle:
    n, me = group_size(group), group_rank(group)
    return post(group, label, [((me + step) % n, x)], [((me - step) % n, out)])


def _travel(own: Tensor, group: Group, arriving: Iterator[Tensor]) -> Iterator[tuple[int, Tensor]]:
    n, me = group_size(group), group_rank(group)
    block, sent = own, own.detach().contiguous()
    for i in range(n - 1):
        coming = next(arriving)
        label = Label("ring", f"hop {i + 1} of {n - 1}", tuple(sent.shape), sent.dtype)
        hop = _hop(group, label, sent, coming.detach(), 1)
        yield (me - i) % n, block
        hop.wait()
        block, sent = coming, coming.detach()
    yield (me + 1) % n, block


class _Lap(Function):
    """The lap as one node: its outputs are the buffers that the hops fill later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.group = group
        return x.view_as(x), *(_like(x) for _ in range(group_size(group) - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        last = len(grads) - 1
        total = _wide_copy(grads[last])
        for i in range(last - 1, -1, -1):
            label = Label("ring", f"backward hop {last - i}", tuple(total.shape), total.dtype)
            buffer = _like(total)
            _hop(ctx.group, label, total, buffer, -1).wait()
            total = buffer.add_(grads[i])
        return total.to(grads[0].dtype), None


def _wide_copy(x: Tensor) -> Tensor:
    """A contiguous copy that is ours to send and to add to."""
    return x.detach().to(wider(x.dtype), memory_format=torch.contiguous_format, copy=True)


@dataclass(frozen=True)
class Visit:
    """A block that is here.

    owner: the rank it belongs to. add: gives its gradient, of the block's shape, at most once a
    visit; the earlier it is called, the more of the gradient's journey is hidden.
    """

    owner: int
    block: Tensor
    add: Callable[[Tensor], None]


class GradRing:
    """The lap of `ring_with_gradients`: iterate it once, then ask for `home()`."""

    def __init__(self, x: Tensor, group: Group) -> None:
        self._x, self._group = x.detach(), group
        self._hop: Handle | None = None
        self._total: Tensor | None = None
        self._begun = self._done = 0

    def __iter__(self) -> Iterator[Visit]:
        assert self._begun == 0, "a lap is iterated once"
        for owner, block in ring(self._x, self._group):
            self._begun += 1
            yield Visit(owner, block, partial(self._add, self._begun))
            if self._done < self._begun:
                self._add(self._begun, None)

    def _add(self, visit: int, grad: Tensor | None) -> None:
        assert self._done < visit == self._begun, "a visit takes one gradient, before the next"
        assert grad is None or grad.shape == self._x.shape, "not of the block's shape"
        with torch.no_grad():
            total = self._sum(grad)
            if group_size(self._group) == 1:
                self._total = total
            else:
                self._total = _like(total)
                label = Label("ring", f"gradient {self._done}", tuple(total.shape), total.dtype)
                self._hop = _hop(self._group, label, total, self._total, 1)
        self._done += 1

    def _sum(self, grad: Tensor | None) -> Tensor:
        if self._total is None:
            dtype = wider(self._x.dtype)
            if grad is None:
                return torch.zeros(self._x.shape, dtype=dtype, device=self._x.device)
            return grad.detach().to(dtype, memory_format=torch.contiguous_format, copy=True)
        self._wait()
        return self._total if grad is None else self._total.add_(grad)

    def _wait(self) -> None:
        if self._hop is not None:
            self._hop.wait()
            self._hop = None

    def home(self) -> Tensor:
        """The sum of all ranks' gradients of this rank's `x`, in the wider of fp32 and x.dtype."""
        assert self._done == group_size(self._group), "the lap is not finished"
        self._wait()
        assert self._total is not None
        return self._total


def ring_with_gradients(x: Tensor, group: Group) -> GradRing:
    """A lap of blocks, visited as in `ring`, whose gradients travel with them and come home.

    `for visit in lap: visit.add(grad of visit.block)`, then `lap.home()`. x: as for `ring`. Every
    rank must finish the lap; a visit without an `add` adds nothing. Not differentiable.
    """
    return GradRing(x, group)

"""The wire: how the four exchanges post messages, over process groups and virtual ranks alike.

Messages between two ranks match in the order they are posted, on NCCL, on gloo and on virtual
ranks; there are no tags. So every exchange posts in an order that is the same on all ranks.
Nothing here synchronizes: a handle's wait orders the current stream after the message.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lcdist.exchange.clock import Stopwatch
from lcdist.exchange.debug import Label, compare, debugging
from lcdist.exchange.traffic import count, waited
from lcdist.exchange.virtual import VirtualRank

Group: TypeAlias = ProcessGroup | VirtualRank | None
"""A process group, one rank of a VirtualGroup, or None: one process."""

Message: TypeAlias = tuple[int, Tensor]
"""A peer's rank in the group, and a contiguous tensor."""

# torch 2.13 renames these two and warns at the old names; drop when torch >= 2.13.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)


def group_size(group: Group) -> int:
    """How many ranks `group` has; 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """This process's rank within `group`; 0 for None."""
    return 0 if group is None else group.rank()


def wider(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are kept in: the wider of it and float32."""
    return torch.promote_types(dtype, torch.float32)


class Handle(Protocol):
    """Messages under way."""

    def wait(self) -> None:
        """Returns when buffers may be read and what was sent may be overwritten.

        On CUDA: by whatever the current stream does next.
        """


@dataclass
class _Works:
    """Works of torch.distributed, and the tensors they read and write."""

    works: list[Any]
    tensors: list[Tensor] = field(default_factory=list)

    def wait(self) -> None:
        if self.works:
            watch = Stopwatch(any(x.is_cuda for x in self.tensors))
            for work in self.works:
                work.wait()
            watch.stop()
            waited(watch)
        self.works, self.tensors = [], []


class _Wire(Protocol):
    def post(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle: ...
    def all_gather(self, x: Tensor, out: Tensor) -> Handle: ...
    def reduce_scatter(self, parts: Tensor, out: Tensor) -> Handle: ...
    def all_to_all(
        self, x: Tensor, out: Tensor, send_sizes: list[int], recv_sizes: list[int]
    ) -> Handle: ...
    def share(self, mine: Any) -> list[Any]: ...


@dataclass(frozen=True)
class _ProcessWire:
    group: ProcessGroup

    def post(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        ops = [self._op(dist.isend, *message) for message in sends]
        ops += [self._op(dist.irecv, *message) for message in recvs]
        works = dist.batch_isend_irecv(ops) if ops else []
        return _Works(works, [x for _, x in (*sends, *recvs)])

    def _op(self, verb: Callable[..., Any], peer: int, x: Tensor) -> dist.P2POp:
        return dist.P2POp(verb, x, dist.get_global_rank(self.group, peer), self.group)

    def all_gather(self, x: Tensor, out: Tensor) -> Handle:
        work = _all_gather(out.view(-1), x.view(-1), group=self.group, async_op=True)
        return _Works([work], [x, out])

    def reduce_scatter(self, parts: Tensor, out: Tensor) -> Handle:
        work = _reduce_scatter(out.view(-1), parts.view(-1), group=self.group, async_op=True)
        return _Works([work], [parts, out])

    def all_to_all(
        self, x: Tensor, out: Tensor, send_sizes: list[int], recv_sizes: list[int]
    ) -> Handle:
        work = dist.all_to_all_single(
            out, x, recv_sizes, send_sizes, group=self.group, async_op=True
        )
        return _Works([work], [x, out])

    def share(self, mine: Any) -> list[Any]:
        everyone = [None] * self.group.size()
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone


def _begin(group: Group, label: Label, sent: int) -> _Wire:
    assert group is not None, "one process has nobody to send to"
    virtual = isinstance(group, VirtualRank)
    wire = group if virtual else _ProcessWire(group)
    if debugging():
        compare(group, label, wire.share)
    if sent:
        count(label.verb, sent, virtual)
    return wire


def post(group: Group, label: Label, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
    """Posts messages to other ranks; empty ones are skipped, on both sides.

    Every rank of the group calls this, also one with no message. On NCCL the group must have been
    used by all its ranks before (or be bound to a device) if only some of them have messages.
    """
    sends = [(peer, x) for peer, x in sends if x.numel()]
    recvs = [(peer, x) for peer, x in recvs if x.numel()]
    assert all(peer != group_rank(group) for peer, _ in (*sends, *recvs)), "a message to oneself"
    return _begin(group, label, sum(x.nbytes for _, x in sends)).post(sends, recvs)


def trade(
    group: Group,
    label: Label,
    outgoing: Mapping[int, Tensor],
    incoming: Mapping[int, Sequence[int]],
    like: Tensor,
) -> Callable[[], Mapping[int, Tensor]]:
    """Posts one message a peer; the result waits and gives what arrived, by source.

    outgoing: contiguous tensors by peer. incoming: shapes by peer. like: gives dtype and device. A
    rank's message to itself is not copied but handed through.
    """
    me = group_rank(group)
    if group_size(group) == 1:
        return lambda: outgoing
    buffers = {peer: like.new_empty(shape) for peer, shape in incoming.items() if peer != me}
    sends = [(peer, x) for peer, x in outgoing.items() if peer != me]
    handle = post(group, label, sends, list(buffers.items()))
    kept = {me: outgoing[me]} if me in outgoing else {}

    def arrive() -> Mapping[int, Tensor]:
        handle.wait()
        return {**buffers, **kept}

    return arrive


def all_gather(group: Group, label: Label, x: Tensor, out: Tensor) -> Handle:
    """Posts every rank's contiguous `x` into `out` `[n, *x.shape]`."""
    wire = _begin(group, label, (group_size(group) - 1) * x.nbytes)
    return wire.all_gather(x, out) if x.numel() else _Works([])


def reduce_scatter(group: Group, label: Label, parts: Tensor, out: Tensor) -> Handle:
    """Posts the sum over ranks of contiguous `parts[rank]` into `out`."""
    wire = _begin(group, label, (group_size(group) - 1) * out.nbytes)
    return wire.reduce_scatter(parts, out) if out.numel() else _Works([])


def all_to_all(
    group: Group, label: Label, pieces: Sequence[Tensor], recv_sizes: list[int]
) -> tuple[Handle, Tensor]:
    """Posts flat `pieces[r]` to rank r; the buffer holds `recv_sizes[r]` elements from each r."""
    x = torch.cat(list(pieces))
    out = x.new_empty(sum(recv_sizes))
    send_sizes = [piece.numel() for piece in pieces]
    sent = (x.numel() - send_sizes[group_rank(group)]) * x.element_size()
    return _begin(group, label, sent).all_to_all(x, out, send_sizes, recv_sizes), out

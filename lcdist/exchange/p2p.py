"""Post messages between ranks, over process groups and virtual ranks alike.

Messages between two ranks match in the order they are posted, on NCCL, on gloo and on virtual
ranks; there are no tags. So every exchange posts in an order that is the same on all ranks.
Nothing here synchronizes the device: a handle's wait orders the current stream after the message.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lcdist.exchange.clock import Stopwatch
from lcdist.exchange.debug import Label, check_agreement, debug_enabled
from lcdist.exchange.traffic import record_sent, record_wait
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
    """Return the number of ranks in `group`; 1 for None."""
    return 1 if group is None else group.size()


def group_rank(group: Group) -> int:
    """Return this process's rank within `group`; 0 for None."""
    return 0 if group is None else group.rank()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums are kept: the wider of float32 and `dtype`."""
    return torch.promote_types(dtype, torch.float32)


class Handle(Protocol):
    """Messages in flight."""

    def wait(self) -> None:
        """Wait until buffers may be read and sent tensors may be overwritten.

        On CUDA this holds for later work on the current stream.
        """


@dataclass
class _WorkHandle:
    """Works of torch.distributed, and the tensors they read and write."""

    works: list[Any]
    tensors: list[Tensor] = field(default_factory=list)

    def wait(self) -> None:
        if self.works:
            watch = Stopwatch(any(x.is_cuda for x in self.tensors))
            for work in self.works:
                work.wait()
            watch.stop()
            record_wait(watch)
        self.works, self.tensors = [], []


class _Wire(Protocol):
    """The operations that a process group and a virtual rank both provide."""

    def post(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle: ...
    def all_gather(self, x: Tensor, out: Tensor) -> Handle: ...
    def reduce_scatter(self, parts: Tensor, out: Tensor) -> Handle: ...
    def all_to_all(
        self, x: Tensor, out: Tensor, send_sizes: list[int], recv_sizes: list[int]
    ) -> Handle: ...
    def all_gather_object(self, obj: Any) -> list[Any]: ...


@dataclass(frozen=True)
class _ProcessWire:
    """A process group as a `_Wire`."""

    group: ProcessGroup

    def post(self, sends: Sequence[Message], recvs: Sequence[Message]) -> Handle:
        ops = [self._p2p_op(dist.isend, *message) for message in sends]
        ops += [self._p2p_op(dist.irecv, *message) for message in recvs]
        works = dist.batch_isend_irecv(ops) if ops else []
        return _WorkHandle(works, [x for _, x in (*sends, *recvs)])

    def _p2p_op(self, op: Callable[..., Any], peer: int, x: Tensor) -> dist.P2POp:
        return dist.P2POp(op, x, dist.get_global_rank(self.group, peer), self.group)

    def all_gather(self, x: Tensor, out: Tensor) -> Handle:
        work = _all_gather(out.view(-1), x.view(-1), group=self.group, async_op=True)
        return _WorkHandle([work], [x, out])

    def reduce_scatter(self, parts: Tensor, out: Tensor) -> Handle:
        work = _reduce_scatter(out.view(-1), parts.view(-1), group=self.group, async_op=True)
        return _WorkHandle([work], [parts, out])

    def all_to_all(
        self, x: Tensor, out: Tensor, send_sizes: list[int], recv_sizes: list[int]
    ) -> Handle:
        work = dist.all_to_all_single(
            out, x, recv_sizes, send_sizes, group=self.group, async_op=True
        )
        return _WorkHandle([work], [x, out])

    def all_gather_object(self, obj: Any) -> list[Any]:
        objects = [None] * self.group.size()
        dist.all_gather_object(objects, obj, group=self.group)
        return objects


def _begin_exchange(group: Group, label: Label, num_bytes: int) -> _Wire:
    """Return the group's wire, after the debug check and counting `num_bytes` as sent."""
    assert group is not None, "a single process has no peers"
    virtual = isinstance(group, VirtualRank)
    wire = group if virtual else _ProcessWire(group)
    if debug_enabled():
        check_agreement(group, label, wire.all_gather_object)
    if num_bytes:
        record_sent(label.verb, num_bytes, virtual)
    return wire


def post_exchange(
    group: Group, label: Label, sends: Sequence[Message], recvs: Sequence[Message]
) -> Handle:
    """Post messages to and from other ranks; empty ones are skipped, on both sides.

    Every rank of the group calls this, also one without messages. On NCCL, if only some ranks have
    messages, all ranks must have used the group before (or it must be bound to a device).
    """
    sends = [(peer, x) for peer, x in sends if x.numel()]
    recvs = [(peer, x) for peer, x in recvs if x.numel()]
    assert all(peer != group_rank(group) for peer, _ in (*sends, *recvs)), "a message to oneself"
    num_bytes = sum(x.nbytes for _, x in sends)
    return _begin_exchange(group, label, num_bytes).post(sends, recvs)


def exchange_by_peer(
    group: Group,
    label: Label,
    outgoing: Mapping[int, Tensor],
    incoming: Mapping[int, Sequence[int]],
    like: Tensor,
) -> Callable[[], Mapping[int, Tensor]]:
    """Post one message per peer; return a function that waits and returns them by source.

    Args:
        group: context-parallel group.
        label: description for the debug check and the byte counters.
        outgoing: contiguous tensors by peer. A rank's message to itself is passed on, not copied.
        incoming: shapes by peer.
        like: gives the dtype and device of the receive buffers.
    """
    rank = group_rank(group)
    if group_size(group) == 1:
        return lambda: outgoing
    buffers = {peer: like.new_empty(shape) for peer, shape in incoming.items() if peer != rank}
    sends = [(peer, x) for peer, x in outgoing.items() if peer != rank]
    handle = post_exchange(group, label, sends, list(buffers.items()))
    own = {rank: outgoing[rank]} if rank in outgoing else {}

    def receive() -> Mapping[int, Tensor]:
        handle.wait()
        return {**buffers, **own}

    return receive


def all_gather(group: Group, label: Label, x: Tensor, out: Tensor) -> Handle:
    """Post an all-gather of contiguous `x` into `out` `[n, *x.shape]`."""
    wire = _begin_exchange(group, label, (group_size(group) - 1) * x.nbytes)
    return wire.all_gather(x, out) if x.numel() else _WorkHandle([])


def reduce_scatter(group: Group, label: Label, parts: Tensor, out: Tensor) -> Handle:
    """Post a reduce-scatter: `out` becomes the sum over ranks of contiguous `parts[rank]`."""
    wire = _begin_exchange(group, label, (group_size(group) - 1) * out.nbytes)
    return wire.reduce_scatter(parts, out) if out.numel() else _WorkHandle([])


def all_to_all(
    group: Group, label: Label, pieces: Sequence[Tensor], recv_sizes: list[int]
) -> tuple[Handle, Tensor]:
    """Post flat `pieces[r]` to every rank r.

    Returns:
        The handle, and a flat buffer for `recv_sizes[r]` elements from each rank r, in rank order.
    """
    x = torch.cat(list(pieces))
    out = x.new_empty(sum(recv_sizes))
    send_sizes = [piece.numel() for piece in pieces]
    num_bytes = (x.numel() - send_sizes[group_rank(group)]) * x.element_size()
    wire = _begin_exchange(group, label, num_bytes)
    return wire.all_to_all(x, out, send_sizes, recv_sizes), out

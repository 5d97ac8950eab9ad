"""shift: send the token intervals named in a plan; the cost does not depend on the sequence length.

The adjoint sends gradients back by the reversed plan and adds them at the source.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lcdist.exchange.debug import Label
from lcdist.exchange.p2p import Group, exchange_by_peer, group_rank, group_size, wide_dtype
from lcdist.exchange.pending import Pending, WaitFn

Interval = tuple[int, int, int, int]
"""(src, dst, start, stop): tokens start..stop of rank src, in its local order, go to rank dst."""


def shift(x: Tensor, plan: Sequence[Interval], group: Group, dim: int = 1) -> Pending:
    """Send intervals of `x` along `dim`; return those addressed to this rank, in plan order.

    Every rank of the group calls this with the same plan; only ranks named in it send or receive.

    Args:
        x: this rank's tensor; ranks may differ in the size of `dim` only.
        plan: intervals, which may overlap, repeat, be empty, or stay on their rank.
        group: context-parallel group.
        dim: dimension of the tokens.

    Returns:
        A pending tensor whose size along `dim` is the total length of the received intervals,
        possibly 0.
    """
    dim %= x.dim()
    _check_plan(plan, group_rank(group), group_size(group), x.shape[dim])
    route = _ShiftRoute(plan, group, dim, x.shape)
    return Pending(x, route.send, route.return_gradients)


def _check_plan(plan: Sequence[Interval], rank: int, n: int, seqlen: int) -> None:
    for src, dst, start, stop in plan:
        assert 0 <= src < n and 0 <= dst < n, f"interval {src, dst, start, stop}: {n} ranks"
        assert 0 <= start <= stop, f"interval {src, dst, start, stop}"
        assert src != rank or stop <= seqlen, f"interval {src, dst, start, stop} of {seqlen} tokens"


class _ShiftRoute:
    """One rank's part of a plan: the intervals it sends and receives.

    Args:
        plan: intervals of all ranks.
        group: context-parallel group.
        dim: dimension of the tokens.
        shape: shape of this rank's tensor.
    """

    def __init__(
        self, plan: Sequence[Interval], group: Group, dim: int, shape: Sequence[int]
    ) -> None:
        self.group, self.dim, self.shape = group, dim, list(shape)
        rank = group_rank(group)
        self.send_ranges = [(dst, start, stop) for src, dst, start, stop in plan if src == rank]
        self.recv_sizes = [(src, stop - start) for src, dst, start, stop in plan if dst == rank]
        self.detail = f"plan {hash(tuple(map(tuple, plan))) & 0xFFFF:04x}"

    def send(self, x: Tensor) -> WaitFn:
        """Post this rank's intervals; the wait returns the received ones, concatenated."""
        parts = [
            (dst, x.narrow(self.dim, start, stop - start)) for dst, start, stop in self.send_ranges
        ]
        receive = self._post("forward", x, parts, self.recv_sizes)
        return lambda: self._concatenate(x, _unpack(receive(), self.recv_sizes, self.dim))

    def return_gradients(self, dout: Tensor) -> WaitFn:
        """Post gradients to the intervals' sources; the wait returns the gradient of `x`."""
        sizes = [size for _, size in self.recv_sizes]
        pieces = dout.split(sizes, self.dim)
        parts = [(src, piece) for (src, _), piece in zip(self.recv_sizes, pieces, strict=True)]
        grad_sizes = [(dst, stop - start) for dst, start, stop in self.send_ranges]
        receive = self._post("backward", dout, parts, grad_sizes)

        def receive_sum() -> Tensor:
            dx = torch.zeros(self.shape, dtype=wide_dtype(dout.dtype), device=dout.device)
            grads = _unpack(receive(), grad_sizes, self.dim)
            for (_, start, stop), grad in zip(self.send_ranges, grads, strict=True):
                dx.narrow(self.dim, start, stop - start).add_(grad)
            return dx.to(dout.dtype)

        return receive_sum

    def _shape_with(self, length: int) -> list[int]:
        return [*self.shape[: self.dim], length, *self.shape[self.dim + 1 :]]

    def _concatenate(self, x: Tensor, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, self.dim) if pieces else x.new_empty(self._shape_with(0))

    def _post(
        self,
        step: str,
        x: Tensor,
        parts: Sequence[tuple[int, Tensor]],
        recv_sizes: Sequence[tuple[int, int]],
    ) -> Callable[[], Mapping[int, Tensor]]:
        """Post one message per peer; the wait returns the received messages by peer."""
        outgoing = {
            peer: torch.cat([part for dst, part in parts if dst == peer], self.dim).contiguous()
            for peer in sorted({dst for dst, _ in parts})
        }
        incoming = {
            peer: self._shape_with(sum(size for src, size in recv_sizes if src == peer))
            for peer in sorted({src for src, _ in recv_sizes})
        }
        label = Label("shift", step, tuple(self._shape_with(-1)), x.dtype, self.detail)
        return exchange_by_peer(self.group, label, outgoing, incoming, x)


def _unpack(
    messages: Mapping[int, Tensor], sizes: Sequence[tuple[int, int]], dim: int
) -> list[Tensor]:
    """Split each peer's message into pieces; return all pieces in the order of `sizes`.

    Args:
        messages: one tensor per peer, its pieces concatenated in the order of `sizes`.
        sizes: (peer, length) of every piece.
        dim: dimension to split.
    """
    offsets = dict.fromkeys(messages, 0)
    pieces = []
    for peer, size in sizes:
        pieces.append(messages[peer].narrow(dim, offsets[peer], size))
        offsets[peer] += size
    return pieces

"""shift: moves the token intervals that a plan names, whatever the sequence length.

Its adjoint is the reversed plan, adding at home.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lcdist.exchange.debug import Label
from lcdist.exchange.p2p import Group, group_rank, group_size, trade, wider
from lcdist.exchange.pending import Arrival, Pending

Interval = tuple[int, int, int, int]
"""(src, dst, start, stop): tokens start..stop of rank src, in its local order, go to rank dst."""


def shift(x: Tensor, plan: Sequence[Interval], group: Group, dim: int = 1) -> Pending:
    """Moves intervals of `x` along `dim`; gives those addressed to this rank, in plan order.

    plan: the same on all ranks, which all call this; only ranks it names exchange anything.
    Intervals may overlap, repeat, be empty, or stay on their rank. x: equal on all ranks in shape
    but for `dim`. The result has as many entries along `dim` as the intervals together, maybe 0.
    """
    dim %= x.dim()
    _check(plan, group_rank(group), group_size(group), x.shape[dim])
    route = _Route(plan, group, dim, x.shape)
    return Pending(x, route.out, route.home)


def _check(plan: Sequence[Interval], me: int, n: int, seqlen: int) -> None:
    for src, dst, start, stop in plan:
        assert 0 <= src < n and 0 <= dst < n, f"interval {src, dst, start, stop}: {n} ranks"
        assert 0 <= start <= stop, f"interval {src, dst, start, stop}"
        assert src != me or stop <= seqlen, f"interval {src, dst, start, stop} of {seqlen} tokens"


class _Route:
    """This rank's part of a plan: what it sends, what it gets, in both directions."""

    def __init__(
        self, plan: Sequence[Interval], group: Group, dim: int, shape: Sequence[int]
    ) -> None:
        self.group, self.dim, self.shape = group, dim, list(shape)
        me = group_rank(group)
        self.leaving = [(dst, a, b) for src, dst, a, b in plan if src == me]
        self.coming = [(src, b - a) for src, dst, a, b in plan if dst == me]
        self.detail = f"plan {hash(tuple(map(tuple, plan))) & 0xFFFF:04x}"

    def out(self, x: Tensor) -> Arrival:
        parts = [(dst, x.narrow(self.dim, a, b - a)) for dst, a, b in self.leaving]
        arrive = self._trade("forward", x, parts, self.coming)
        return lambda: self._cat(x, _unpack(arrive(), self.coming, self.dim))

    def home(self, dout: Tensor) -> Arrival:
        parts = list(zip(self._sources(), dout.split(self._lengths(), self.dim), strict=True))
        returning = [(dst, b - a) for dst, a, b in self.leaving]
        arrive = self._trade("backward", dout, parts, returning)

        def add() -> Tensor:
            dx = torch.zeros(self.shape, dtype=wider(dout.dtype), device=dout.device)
            pieces = _unpack(arrive(), returning, self.dim)
            for (_, a, b), piece in zip(self.leaving, pieces, strict=True):
                dx.narrow(self.dim, a, b - a).add_(piece)
            return dx.to(dout.dtype)

        return add

    def _sources(self) -> list[int]:
        return [src for src, _ in self.coming]

    def _lengths(self) -> list[int]:
        return [length for _, length in self.coming]

    def _sized(self, length: int) -> list[int]:
        return [*self.shape[: self.dim], length, *self.shape[self.dim + 1 :]]

    def _cat(self, x: Tensor, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, self.dim) if pieces else x.new_empty(self._sized(0))

    def _trade(
        self,
        step: str,
        x: Tensor,
        parts: Sequence[tuple[int, Tensor]],
        expected: Sequence[tuple[int, int]],
    ) -> Callable[[], Mapping[int, Tensor]]:
        outgoing = {
            peer: torch.cat([part for to, part in parts if to == peer], self.dim).contiguous()
            for peer in sorted({to for to, _ in parts})
        }
        incoming = {
            peer: self._sized(sum(size for p, size in expected if p == peer))
            for peer in sorted({p for p, _ in expected})
        }
        label = Label("shift", step, tuple(self._sized(-1)), x.dtype, self.detail)
        return trade(self.group, label, outgoing, incoming, x)


def _unpack(
    boxes: Mapping[int, Tensor], expected: Sequence[tuple[int, int]], dim: int
) -> list[Tensor]:
    """The pieces in the order expected: each peer's box holds its own in that order."""
    taken = dict.fromkeys(boxes, 0)
    pieces = []
    for peer, size in expected:
        pieces.append(boxes[peer].narrow(dim, taken[peer], size))
        taken[peer] += size
    return pieces

"""Which intervals of keys each rank of SCCA gets from whom, from the mask's own formula.

A rank needs what its queries' windows name and it does not hold. Window by window that is the
union of [first, last] over its queries (`Rule.limits`), cut at the borders of shards: with masked
wrap and chunks that divide the contiguous piece, a shift takes from at most two ranks (four under
zigzag); any other case follows from the same lines (arXiv:2312.07305; the paper has no parallel
form).
"""

from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.exchange import Interval
from lcdist.layout import ContextLayout
from lcdist_kernels.scca import Rule

Span = tuple[int, int]
"""Global token numbers start..stop."""

Borders = tuple[int, ...] | None
"""cu_seqlens as integers; None: one document."""


class Moves(NamedTuple):
    """The exchange for one set of rules.

    intervals: what `shift` takes, in local order, for each receiver by rising global number.
    arrivals: for each receiver the global numbers of what it gets, in that order, as spans.
    """

    intervals: tuple[Interval, ...]
    arrivals: tuple[tuple[Span, ...], ...]

    def arrived(self, rank: int) -> Tensor:
        """Global numbers of the tokens that `rank` gets, increasing: int64, on the CPU."""
        return torch.cat([torch.arange(0), *(torch.arange(*span) for span in self.arrivals[rank])])

    def back(self) -> tuple[Interval, ...]:
        """The plan that takes what arrived home: intervals of each receiver's tokens."""
        taken = [0] * len(self.arrivals)
        plan = []
        for src, dst, start, stop in self.intervals:
            plan.append((dst, src, taken[dst], taken[dst] + stop - start))
            taken[dst] += stop - start
        return tuple(plan)

    def leaving(self, rank: int) -> list[Span]:
        """Local intervals that `rank` sends, in plan order."""
        return [(start, stop) for src, _, start, stop in self.intervals if src == rank]


def borders_of(cu_seqlens: Tensor | None) -> Borders:
    """cu_seqlens as a plan takes it."""
    return None if cu_seqlens is None else tuple(cu_seqlens.tolist())


# Staggered layers of many units have a plan each; with packed documents every batch has its own.
@lru_cache(maxsize=1024)
def moves(rules: tuple[Rule, ...], layout: ContextLayout, borders: Borders = None) -> Moves:
    """Who sends which keys so that every rank has all that `rules`, window rules, show it."""
    owned = _owned(layout)
    intervals, arrivals = [], []
    for dst in range(layout.cp_size):
        got = []
        for start, stop in needed(rules, layout, dst, borders):
            pieces = [
                (max(start, a), min(stop, b), src, max(start, a) - a + local)
                for src, pieces in enumerate(owned)
                for (a, b), local in zip(pieces, _offsets(pieces), strict=True)
                if src != dst and max(start, a) < min(stop, b)
            ]
            for a, b, src, local in sorted(pieces):
                intervals.append((src, dst, local, local + b - a))
                got.append((a, b))
        arrivals.append(tuple(got))
    return Moves(tuple(intervals), tuple(arrivals))


def needed(
    rules: tuple[Rule, ...], layout: ContextLayout, rank: int, borders: Borders = None
) -> list[Span]:
    """The keys that the queries of `rank` see under any of `rules`: disjoint spans, in order."""
    documents = [0, *(borders or ()), layout.seqlen]
    spans = []
    for begin, end in _owned(layout)[rank]:
        for i in range(bisect_right(documents, begin) - 1, bisect_left(documents, end)):
            start = documents[i]
            held = max(begin, start) - start, min(end, documents[i + 1]) - start
            if held[0] >= held[1]:
                continue
            for rule in rules:
                # The last query of a window sees all that the others do.
                first, last = rule.limits(rule.turns(*held))
                spans += zip((first + start).tolist(), (last + start + 1).tolist(), strict=True)
    return _union(spans)


def _union(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, stop in sorted(spans):
        if start >= stop:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined


@lru_cache(maxsize=16)
def _owned(layout: ContextLayout) -> tuple[list[Span], ...]:
    """The tokens of each rank."""
    return tuple(_spans(layout.positions(rank)) for rank in range(layout.cp_size))


def _spans(numbers: Tensor) -> list[Span]:
    """Increasing numbers as spans."""
    new = torch.ones_like(numbers, dtype=torch.bool)
    new[1:] = numbers.diff() > 1
    first = new.nonzero().flatten().tolist()
    return [
        (int(numbers[a]), int(numbers[b - 1]) + 1)
        for a, b in zip(first, [*first[1:], len(numbers)], strict=True)
    ]


def _offsets(spans: list[Span]) -> list[int]:
    """Where each of a rank's spans begins in its local order."""
    ends = [0]
    for start, stop in spans:
        ends.append(ends[-1] + stop - start)
    return ends[:-1]

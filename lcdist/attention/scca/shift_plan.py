"""Shift plans for SCCA's window rules: the intervals of keys that each rank sends and receives.

A rank needs the keys in its queries' windows that it does not hold. They are the union of
[first, last] (`Rule.limits`) over its windows, cut at shard borders. With masked wrap and chunks
that divide the contiguous piece, a rank receives from at most two ranks (four under zigzag). All
other cases follow from the same code (arXiv:2312.07305; the paper has no parallel form).
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
"""Token numbers start..stop."""

Documents = tuple[int, ...] | None
"""Document borders as integers; None: one document."""


class ShiftPlan(NamedTuple):
    """The exchange for one set of rules.

    intervals: plan for `shift`, in local order; each receiver's by increasing global number.
    received_spans: per receiver, the global numbers of the tokens it receives, in that order.
    """

    intervals: tuple[Interval, ...]
    received_spans: tuple[tuple[Span, ...], ...]

    def received_ids(self, rank: int) -> Tensor:
        """Return the global numbers of the tokens that `rank` receives: int64, increasing, CPU."""
        spans = self.received_spans[rank]
        return torch.cat([torch.arange(0), *(torch.arange(*span) for span in spans)])

    def reversed(self) -> tuple[Interval, ...]:
        """Return the plan that sends received tokens back, numbered as each receiver got them."""
        offsets = [0] * len(self.received_spans)
        plan = []
        for src, dst, start, stop in self.intervals:
            plan.append((dst, src, offsets[dst], offsets[dst] + stop - start))
            offsets[dst] += stop - start
        return tuple(plan)

    def send_ranges(self, rank: int) -> list[Span]:
        """Return the local intervals that `rank` sends, in plan order."""
        return [(start, stop) for src, _, start, stop in self.intervals if src == rank]


# Staggered layers of many units have a plan each; with packed documents every batch has its own.
@lru_cache(maxsize=1024)
def make_shift_plan(
    rules: tuple[Rule, ...], layout: ContextLayout, documents: Documents = None
) -> ShiftPlan:
    """Compute the shift plan that gives each rank the keys its window rules attend to."""
    owned = _owned_spans(layout)
    intervals, received_spans = [], []
    for dst in range(layout.cp_size):
        received = []
        for start, stop in visible_spans(rules, layout, dst, documents):
            for first, last, src, offset in owned[bisect_right(owned, start, key=_end_of) :]:
                if first >= stop:
                    break
                if src != dst:
                    a, b = max(start, first), min(stop, last)
                    intervals.append((src, dst, a - first + offset, b - first + offset))
                    received.append((a, b))
        received_spans.append(tuple(received))
    return ShiftPlan(tuple(intervals), tuple(received_spans))


def visible_spans(
    rules: tuple[Rule, ...], layout: ContextLayout, rank: int, documents: Documents = None
) -> list[Span]:
    """Return the keys that `rank`'s queries see under any of `rules`: disjoint, in order."""
    borders = [0, *(documents or ()), layout.seqlen]
    spans = []
    for begin, end in layout.spans(rank):
        for i in range(bisect_right(borders, begin) - 1, bisect_left(borders, end)):
            start = borders[i]
            first_query, end_query = max(begin, start) - start, min(end, borders[i + 1]) - start
            if first_query >= end_query:
                continue
            for rule in rules:
                # The last query of a window sees all keys that the others see.
                first, last = rule.limits(rule.window_ends(first_query, end_query))
                spans += _joined_spans(first + start, last + start + 1)
    return _merge_spans(spans)


def _merge_spans(spans: list[Span]) -> list[Span]:
    """Return the union as disjoint spans in order; empty spans are dropped."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _joined_spans(starts: Tensor, stops: Tensor) -> list[Span]:
    """Return the union of spans as disjoint ones in order: as `_merge_spans`, of tensors."""
    starts, stops = starts[starts < stops], stops[starts < stops]
    if not len(starts):
        return []
    order = starts.argsort(stable=True)
    starts, stops = starts[order], stops[order].cummax(0).values
    begins = torch.ones_like(starts, dtype=torch.bool)
    begins[1:] = starts[1:] > stops[:-1]
    return list(zip(starts[begins].tolist(), stops[begins.roll(-1)].tolist(), strict=True))


def _end_of(owned: tuple[int, int, int, int]) -> int:
    return owned[1]


@lru_cache(maxsize=16)
def _owned_spans(layout: ContextLayout) -> list[tuple[int, int, int, int]]:
    """Return the spans of tokens of all ranks, in order: start, stop, rank, local number."""
    return sorted(
        (*span, rank, offset)
        for rank in range(layout.cp_size)
        for span, offset in zip(layout.spans(rank), _local_offsets(layout.spans(rank)), strict=True)
    )


def _local_offsets(spans: list[Span]) -> list[int]:
    """Return the local number of the first token of each of a rank's spans."""
    offsets = [0]
    for start, stop in spans:
        offsets.append(offsets[-1] + stop - start)
    return offsets[:-1]

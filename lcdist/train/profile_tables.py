"""Sum up a trace: kernels by place, and memory at its peak by place."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from lcdist.rundir.profile import KernelRow, MemoryRow, Profile
from lcdist.train.trace_places import (
    Allocation,
    HostEvents,
    Place,
    Span,
    host_events,
    nanoseconds,
    step_spans,
)

DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
# torch's numbers of device types.
DEVICE_TYPES = {"cpu": 0, "cuda": 1}
NO_OPERATION = "(Python)"
NO_KERNEL = "(no kernel)"


class _Sums:
    """Launches, nanoseconds and bytes by place and kernel."""

    def __init__(self) -> None:
        self._sums: dict[tuple[Place, str], list[int]] = defaultdict(lambda: [0, 0, 0])

    def add(
        self, place: Place, kernel: str = "", *, launches: int = 0, ns: int = 0, size: int = 0
    ) -> None:
        entry = self._sums[place, kernel]
        entry[0] += launches
        entry[1] += ns
        entry[2] += size

    def rows(self) -> list[KernelRow]:
        rows = [
            KernelRow(
                phase=place.phase,
                place=place.name,
                operation=place.operation,
                kernel=kernel,
                launches=launches,
                ms=ns / 1e6,
                bytes=size,
            )
            for (place, kernel), (launches, ns, size) in self._sums.items()
        ]
        return sorted(rows, key=lambda row: (-row.ms, row.phase, row.place, row.operation))


def profile_of(
    events: Sequence[Mapping[str, Any]], *, first: int, last: int, rank: int, device: str
) -> Profile:
    """Return the tables of a trace.

    Args:
        events: the events of the trace in Chrome's format.
        first: first step in it.
        last: last step in it.
        rank: the rank that was profiled.
        device: "cuda": the time of kernels counts; "cpu": the own time of operations.
    """
    host = host_events(events)
    device_type = DEVICE_TYPES[device]
    allocations = [each for each in host.allocations if each.device == device_type]
    on_gpu = device == "cuda"
    rows = _device_rows(events, host, allocations) if on_gpu else _host_rows(host, allocations)
    peak, before, memory = _peak(allocations)
    steps = [span.end - span.start for span in step_spans(host.spans)]
    return Profile(
        first=first,
        last=last,
        rank=rank,
        device=device,
        step_ms=sum(steps) / max(1, len(steps)) / 1e6,
        rows=rows,
        peak_bytes=peak,
        before_bytes=before,
        memory=memory,
    )


def _host_rows(host: HostEvents, allocations: Sequence[Allocation]) -> list[KernelRow]:
    """Return the rows of a CPU: an operation has the time of those that it calls."""
    sums = _Sums()
    for span in host.spans:
        place = span.place
        if not place.operation:
            place = place._replace(operation=NO_OPERATION)
        sums.add(place, launches=int(span.starts_operation), ns=max(0, span.own))
    for each in allocations:
        if each.bytes > 0:
            operation = each.place.operation or NO_OPERATION
            sums.add(each.place._replace(operation=operation), size=each.bytes)
    return sums.rows()


def _device_rows(
    events: Sequence[Mapping[str, Any]], host: HostEvents, allocations: Sequence[Allocation]
) -> list[KernelRow]:
    """Return the rows of a GPU: every kernel at the place that launched it.

    Memory goes to the first kernel that is launched at the place after its allocation.
    """
    launches = {s.correlation: s for s in host.spans if s.correlation is not None}
    sums, kernels = _Sums(), dict[int, str]()
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in DEVICE_KINDS:
            correlation = event.get("args", {}).get("correlation")
            place = launches[correlation].place if correlation in launches else Place()
            sums.add(place, event["name"], launches=1, ns=nanoseconds(event, "dur"))
            kernels.setdefault(correlation, event["name"])
    waiting: dict[Place, int] = defaultdict(int)
    marks: list[tuple[int, Allocation | Span]] = [(a.time, a) for a in allocations if a.bytes > 0]
    marks += [(s.start, s) for s in host.spans if s.correlation in kernels]
    for _, mark in sorted(marks, key=lambda pair: pair[0]):
        around = mark.place._replace(operation="")
        if isinstance(mark, Allocation):
            waiting[around] += mark.bytes
        elif waiting[around]:
            assert mark.correlation is not None
            sums.add(mark.place, kernels[mark.correlation], size=waiting.pop(around))
    for place, size in waiting.items():
        if size:
            sums.add(place, NO_KERNEL, size=size)
    return sums.rows()


def _peak(allocations: Sequence[Allocation]) -> tuple[int, int, list[MemoryRow]]:
    """Return the most bytes allocated at once, those allocated before, and the others by place."""
    if not allocations:
        return 0, 0, []
    before = max(0, allocations[0].total - allocations[0].bytes)
    sizes = list(accumulate((each.bytes for each in allocations), initial=before))
    most = max(sizes)
    live: dict[int, Allocation] = {}
    for each in allocations[: sizes.index(most)]:
        if each.bytes > 0:
            live[each.address] = each
        elif live.pop(each.address, None) is None:
            before += each.bytes
    by_place: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for each in live.values():
        entry = by_place[each.place.phase, each.place.name]
        entry[0] += each.bytes
        entry[1] += 1
    rows = [
        MemoryRow(phase=phase, place=place, bytes=size, count=count)
        for (phase, place), (size, count) in by_place.items()
    ]
    rows.sort(key=lambda row: (-row.bytes, row.phase, row.place))
    return most, max(0, before), rows

"""Find the place in the model of every event of a trace in Chrome's format.

torch's profiler writes what the host does as nested spans: operations (`cpu_op`), autograd nodes,
ranges that Python opens (`user_annotation`), and calls of CUDA (`cuda_runtime`, `cuda_driver`).
Ranges whose names begin with MODULE, PHASE or STEP are opened by `profiler.py`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MODULE, PHASE, STEP = "module ", "phase ", "step "
FORWARD, BACKWARD, OPTIMIZER, OTHER = "forward", "backward", "optimizer", "other"
ANNOTATION, OPERATION = "user_annotation", "cpu_op"
LAUNCH_KINDS = ("cuda_runtime", "cuda_driver")
SPAN_KINDS = (ANNOTATION, OPERATION, *LAUNCH_KINDS)
# The span in which autograd runs one node of the graph.
NODE = "autograd::engine::evaluate_function: "
# An operation with a plain name that is no autograd Function.
_NO_FUNCTIONS = ("record_param_comms",)
_MESSAGES = ("gloo:", "nccl:")

Thread = tuple[Any, Any]
# Sequence number of an autograd node, and the thread of its forward.
Node = tuple[int, int]


class Place(NamedTuple):
    """A place in a step: phase, module, autograd Function, and the operation called there."""

    phase: str = OTHER
    module: str = ""
    function: str = ""
    operation: str = ""

    @property
    def name(self) -> str:
        """Return module and Function as one text."""
        module = self.module.removeprefix("decoder.")
        return " ".join(part for part in (module, self.function) if part) or "step"


@dataclass(slots=True)
class Span:
    """A span of the host's time, in nanoseconds; `own` is its time without the spans inside.

    correlation: number of a launch, which its kernel has too.
    node: the autograd node that runs in this span.
    """

    name: str
    kind: str
    start: int
    end: int
    correlation: int | None
    node: Node | None
    place: Place = Place()
    own: int = 0
    starts_operation: bool = False


@dataclass(slots=True)
class Allocation:
    """Memory that is allocated, or freed if `bytes` is negative; on a device of type `device`."""

    time: int
    address: int
    bytes: int
    total: int
    device: int
    place: Place = Place()


@dataclass
class HostEvents:
    """Spans and allocations of all threads, with their places, each list in order of time."""

    spans: list[Span] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)


def host_events(events: Sequence[Mapping[str, Any]]) -> HostEvents:
    """Return what the host did in a trace, with the place of everything."""
    threads: dict[Thread, list[Span | Allocation]] = {}
    for event in events:
        entry = _span(event) or _allocation(event)
        if entry is not None:
            threads.setdefault(_thread(event), []).append(entry)
    forward_of = _forward_starts(events, threads)
    places: dict[tuple[Thread, int], Place] = {}
    found = HostEvents()
    # The forward runs before the backward that needs its places, on whichever threads they are.
    merged = [(thread, entry) for thread, entries in threads.items() for entry in entries]
    merged.sort(key=lambda pair: (_start(pair[1]), -_end(pair[1])))
    stacks: dict[Thread, list[Span]] = {thread: [] for thread in threads}
    for thread, entry in merged:
        stack = stacks[thread]
        while stack and stack[-1].end <= _start(entry):
            stack.pop()
        outer = stack[-1].place if stack else Place()
        if isinstance(entry, Allocation):
            entry.place = outer
            found.allocations.append(entry)
            continue
        forward = None
        if entry.node in forward_of:
            forward = places.get(forward_of[entry.node])
        entry.place = _place(entry, outer, forward)
        entry.starts_operation = bool(entry.place.operation) and entry.place != outer
        entry.own = entry.end - entry.start
        if stack:
            stack[-1].own -= min(entry.end, stack[-1].end) - entry.start
        places[thread, entry.start] = entry.place
        stack.append(entry)
        found.spans.append(entry)
    return found


def _start(entry: Span | Allocation) -> int:
    return entry.start if isinstance(entry, Span) else entry.time


def _end(entry: Span | Allocation) -> int:
    return entry.end if isinstance(entry, Span) else entry.time


def _thread(event: Mapping[str, Any]) -> Thread:
    return event.get("pid"), event.get("tid")


def nanoseconds(event: Mapping[str, Any], key: str) -> int:
    """Return a time of an event, which the format gives in microseconds."""
    return round(1000 * float(event.get(key, 0.0)))


def _span(event: Mapping[str, Any]) -> Span | None:
    if event.get("ph") != "X" or event.get("cat") not in SPAN_KINDS:
        return None
    # Messages on the way: they last until they arrive, whatever the thread does meanwhile.
    if event["cat"] == ANNOTATION and event["name"].startswith(_MESSAGES):
        return None
    start = nanoseconds(event, "ts")
    end = start + nanoseconds(event, "dur")
    args, correlation, node = event.get("args", {}), None, None
    if event["cat"] in LAUNCH_KINDS:
        correlation = args.get("correlation")
    if args.get("Fwd thread id") and "Sequence number" in args:
        node = args["Sequence number"], args["Fwd thread id"]
    return Span(event["name"], event["cat"], start, end, correlation, node)


def _allocation(event: Mapping[str, Any]) -> Allocation | None:
    if event.get("name") != "[memory]":
        return None
    args = event["args"]
    return Allocation(
        nanoseconds(event, "ts"),
        args["Addr"],
        args["Bytes"],
        args.get("Total Allocated", 0),
        args["Device Type"],
    )


def _forward_starts(
    events: Sequence[Mapping[str, Any]], threads: Mapping[Thread, Sequence[Span | Allocation]]
) -> dict[Node | None, tuple[Thread, int]]:
    """Map autograd nodes to thread and start of the operations that made them.

    torch writes arrows of the category `fwdbwd` from the operation, `s`, to the node, `f`.
    """
    nodes = {
        (thread, entry.start): entry.node
        for thread, entries in threads.items()
        for entry in entries
        if isinstance(entry, Span) and entry.node is not None
    }
    arrows = [event for event in events if event.get("cat") == "fwdbwd"]
    tails = {e["id"]: (_thread(e), nanoseconds(e, "ts")) for e in arrows if e["ph"] == "s"}
    heads = {e["id"]: (_thread(e), nanoseconds(e, "ts")) for e in arrows if e["ph"] == "f"}
    return {nodes[heads[i]]: tails[i] for i in tails if heads.get(i) in nodes}


def _place(span: Span, outer: Place, forward: Place | None) -> Place:
    """Return the place of a span.

    Args:
        span: the span.
        outer: the place of the span around it.
        forward: the place of the operation that made the span's autograd node, if it is one.
    """
    name = span.name
    if span.kind == ANNOTATION:
        return _range_place(name, outer)
    if span.kind != OPERATION:
        return outer
    if name.startswith(NODE):
        return Place(BACKWARD, forward.module if forward else "")
    is_function = ":" not in name or name.startswith("torch::autograd::")
    if is_function and name not in _NO_FUNCTIONS and not outer.operation:
        name = name.removeprefix("torch::autograd::").removesuffix("Backward")
        # The node of one of torch's own operations says less than its module.
        is_plain_node = bool(re.fullmatch(r"\w+Backward\d+", name)) and bool(outer.module)
        return Place(outer.phase, outer.module, "" if is_plain_node else name)
    return outer if outer.operation else outer._replace(operation=name)


def _range_place(name: str, outer: Place) -> Place:
    """Return the place within a range that Python opened."""
    if name.startswith(MODULE):
        # A module that runs within the backward is recomputed.
        phase = BACKWARD if outer.phase == BACKWARD else FORWARD
        return Place(phase, re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(MODULE)))
    if name.startswith(PHASE):
        phase = name.removeprefix(PHASE)
        return Place(OPTIMIZER if phase == OPTIMIZER else OTHER, phase)
    return outer


def step_spans(spans: Sequence[Span]) -> Iterator[Span]:
    """Yield the spans of whole steps."""
    return (span for span in spans if span.kind == ANNOTATION and span.name.startswith(STEP))

"""Work out which share of a run's wall time trained, over all its starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lcdist.rundir.records import StepRecord


@dataclass(frozen=True)
class EffectiveTime:
    """Seconds of a run, from the beginning of its first process to `end`.

    Attributes:
        wall: all of it.
        trained: steps that count.
        starting: from the beginning of each process to its first step.
        saving: training waited for a checkpoint.
        lost: steps that were done again after a restart.
        between: no process ran.
        other: the rest, such as an end after the last save.
    """

    wall: float
    trained: float
    starting: float
    saving: float
    lost: float
    between: float
    other: float


def effective_time(
    starts: Sequence[Mapping[str, Any]], records: Sequence[StepRecord], end: float
) -> EffectiveTime | None:
    """Return where a run's wall time went.

    Args:
        starts: of run.json.
        records: of metrics.jsonl.
        end: seconds since 1970: now for a run that runs, else the end of its last process.

    Returns:
        None if an older version wrote one of the starts.
    """
    if not starts or not all("began" in start for start in starts):
        return None
    ends = [_end(start, following) for start, following in pairwise(starts)]
    ends.append(max(end, starts[-1]["began"]))
    spans = [max(0.0, stop - start["began"]) for start, stop in zip(starts, ends, strict=True)]
    wall = ends[-1] - starts[0]["began"]
    # A process that ended before its first step did nothing but start.
    starting = sum(
        min(start.get("before_first_step_seconds", span), span)
        for start, span in zip(starts, spans, strict=True)
    )
    trained = sum(record.time.step for record in records)
    saving = sum(start.get("saving_seconds", 0.0) for start in starts)
    lost = sum(start.get("lost_seconds", 0.0) for start in starts)
    between = max(0.0, wall - sum(spans))
    other = max(0.0, wall - trained - starting - saving - lost - between)
    return EffectiveTime(wall, trained, starting, saving, lost, between, other)


def last_end(starts: Sequence[Mapping[str, Any]], records: Sequence[StepRecord]) -> float:
    """Return when the last process was last seen, in seconds since 1970."""
    ends = [start.get("ended", 0.0) for start in starts[-1:]]
    return max([0.0, *ends, *(record.wall for record in records[-1:])])


def _end(start: Mapping[str, Any], following: Mapping[str, Any]) -> float:
    """Return when a process was last seen: what it recorded, or its last step."""
    seen = max(start.get("ended", 0.0), following.get("last_seen") or 0.0, start["began"])
    return min(seen, following["began"])


def describe_effective(time: EffectiveTime) -> str:
    """Return the shares as one line, the largest losses first."""
    parts = {
        "starts": time.starting,
        "saves": time.saving,
        "work done again": time.lost,
        "between starts": time.between,
        "other": time.other,
    }
    wall = max(time.wall, 1e-9)
    shown = sorted(parts.items(), key=lambda part: -part[1])
    text = ", ".join(f"{name} {_percent(s / wall)}" for name, s in shown if s / wall >= 0.0005)
    return f"{_percent(min(1.0, time.trained / wall))} trained" + (f"; {text}" if text else "")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

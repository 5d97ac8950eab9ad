"""Read and write status.json, and describe a run from its folder alone."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lcdist.rundir.effective import describe_effective, effective_time, last_end
from lcdist.rundir.header import REMOVE, read_header
from lcdist.rundir.lock import SILENCE, read_owner, silence_of
from lcdist.rundir.paths import (
    CHECKPOINTS,
    CONFIG_FILE,
    HEADER_FILE,
    METRICS_FILE,
    STATUS_FILE,
    CheckpointError,
    latest_in,
    step_of,
)
from lcdist.rundir.records import StepRecord, read_records, without_profiled
from lcdist.rundir.run_config import read_config
from lcdist.rundir.signals import STOP
from lcdist.utils.atomic import write_file
from lcdist.utils.json_file import read_object

# Rates are medians over this many of the last steps.
RATE_STEPS = 20
_TYPES = {"status": str, "step": int, "reason": str}


def write_status(folder: Path, status: str, step: int, reason: str) -> None:
    """Write the status, the step and the reason.

    status: "running", "stopped", "finished", "stalled" or "failed".
    """
    table = {"status": status, "step": step, "reason": reason}
    write_file(folder / STATUS_FILE, json.dumps(table) + "\n")


def read_status(folder: Path) -> Mapping[str, Any] | None:
    """Return what `write_status` wrote last; None if there is no status."""
    file = folder / STATUS_FILE
    return read_object(file, _TYPES, REMOVE) if file.exists() else None


def describe(folder: Path, now: float | None = None) -> list[tuple[str, str]]:
    """Return rows (name, value) that describe the run in `folder`.

    Args:
        folder: run folder.
        now: seconds since 1970; None: the current time.

    Raises:
        FileNotFoundError: `folder` is not a run folder.
        ValueError: a file in it is damaged.
    """
    if not (folder / CONFIG_FILE).exists():
        raise FileNotFoundError(
            f"{folder} is not the folder of a run: no {CONFIG_FILE}; give its log.folder"
        )
    config = read_config(folder)
    file, header = folder / METRICS_FILE, folder / HEADER_FILE
    records = read_records(file) if file.exists() else []
    starts = read_header(header)["starts"] if header.exists() else []
    status = read_status(folder) or {"status": "never started", "step": 0, "reason": ""}
    now = time.time() if now is None else now
    death = _death(folder, now) if status["status"] == "running" else ""
    running = status["status"] == "running" and not death
    rows = [("state", f"{death}. {way_back(folder)}" if death else _state(status))]
    if (folder / STOP).exists():
        rows.append(("asked to stop", f"by the file {STOP}{', still running' if running else ''}"))
    rows.append(("progress", _progress(status, records, config.train.steps)))
    if records:
        rows += _rates(records, config.train.steps, running, now)
    rows.append(("last checkpoint", _checkpoint(folder, records, now)))
    effective = effective_time(starts, records, now if running else last_end(starts, records))
    if effective is not None:
        rows.append(("effective time", describe_effective(effective)))
    return [*rows, *_starts(starts)]


def stage_folders(folder: Path) -> list[Path]:
    """Return the run folders of several stages, in order; empty if `folder` is a run folder."""
    if (folder / CONFIG_FILE).exists():
        return []
    found = [file.parent for file in folder.glob(f"*/{CONFIG_FILE}")]
    return sorted(found, key=lambda stage: (len(stage.name.partition("-")[0]), stage.name))


def way_back(folder: Path) -> str:
    """Return which checkpoint the run in `folder` goes on from, and how to go further back."""
    try:
        newest = latest_in(folder / CHECKPOINTS)
    except CheckpointError as error:
        return str(error)
    if newest is None:
        return "The run has no checkpoint yet: it begins again"
    steps = sorted(step_of(path) for path in newest.parent.glob("step_*"))
    older = [step for step in steps if step < step_of(newest)]
    text = f"The run goes on from step {step_of(newest)}"
    if older:
        text += f", or with checkpoint.resume_from={older[-1]} from step {older[-1]}"
    return text


def _state(status: Mapping[str, Any]) -> str:
    return f"{status['status']}: {status['reason']}" if status["reason"] else status["status"]


def _death(folder: Path, now: float) -> str:
    """Return how a run ended that could not say so itself; empty if it lives."""
    owner = read_owner(folder)
    if owner is None:
        return "died: nothing says which process it was"
    gone, silence = owner.is_gone, silence_of(folder, now)
    if gone:
        text = f"died: {owner} was killed, or its machine was restarted"
    elif silence <= SILENCE:
        return ""
    else:
        text = f"frozen: {owner}" if gone is False else f"died: {owner} or its machine"
    return f"{text}; last sign of life {duration(silence)} ago"


def _progress(status: Mapping[str, Any], records: Sequence[StepRecord], steps: int) -> str:
    done = records[-1].step if records else status["step"]
    return f"step {done:,} of {steps:,} ({100 * done / steps:.1f} %)"


def _rates(
    records: Sequence[StepRecord], steps: int, running: bool, now: float
) -> list[tuple[str, str]]:
    last = without_profiled(records)[-RATE_STEPS:]
    step, left = _median([r.time.step for r in last]), steps - records[-1].step
    rows = [
        ("loss", f"{records[-1].loss:.4f}"),
        ("speed", f"{_median([r.tokens_per_second for r in last]):,.0f} tokens/s, "
         f"{step:.3g} s a step"),
    ]  # fmt: skip
    # A time step beyond it is damage, and no date has so many digits.
    if left > 0 and running and left * step < 1e10:
        end = datetime.fromtimestamp(now + left * step, UTC)
        rows.append(("time left", f"{duration(left * step)}, until {end:%Y-%m-%d %H:%M} UTC"))
    ranks = [r.ranks for r in last if r.ranks is not None and r.ranks.least > 0]
    if ranks:
        spread = _median([times.most / times.least for times in ranks])
        slowest = statistics.mode(times.slowest for times in ranks)
        rows.append(("slowest rank", f"{slowest}, with {spread:.2f} times the fastest's own work"))
    return rows


def _checkpoint(folder: Path, records: Sequence[StepRecord], now: float) -> str:
    try:
        newest = latest_in(folder / CHECKPOINTS)
    except CheckpointError as error:
        return str(error)
    if newest is None:
        return "none yet"
    step = step_of(newest)
    text = f"step {step:,}"
    walls = {record.step: record.wall for record in records}
    if step in walls:
        text += f", {duration(now - walls[step])} ago"
    after = [record.time.step for record in records if record.step > step]
    return text + (f"; {len(after)} steps, {duration(sum(after))}, since" if after else "")


def _starts(starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    if not starts:
        return []
    lost = sum(start.get("lost_seconds", 0.0) for start in starts)
    steps = sum(start.get("lost_steps", 0) for start in starts)
    rows = [("restarts", str(len(starts) - 1))]
    if steps:
        rows.append(("work done again", f"{steps:,} steps, {duration(lost)}"))
    first = starts[-1].get("first_step_seconds")
    if first is not None:
        rows.append(("last start", f"{starts[-1]['time']}, first step after {duration(first)}"))
    return rows


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def duration(seconds: float) -> str:
    """Return a duration as text: "45 s", "12 min", "3 h 5 min", "2 d 4 h"."""
    whole = max(0, round(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"

"""Read and write run.json: plan, devices and package versions of a run, and all its starts."""

import json
import platform
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from lcdist.rundir.paths import HEADER_FILE
from lcdist.rundir.records import read_records
from lcdist.utils.atomic import write_file
from lcdist.utils.json_file import check_types, read_object

# run.json is a record: a run goes on without it, under a new id.
REMOVE = "remove the file; the run does not need it"
_START = {"step": int, "time": str}
_START_OPTIONAL = {
    "reason": str,
    "lost_steps": int,
    "lost_seconds": float,
    "first_step_seconds": float,
    "before_first_step_seconds": float,
    "saving_seconds": float,
    "began": float,
    "ended": float,
    "last_seen": float | None,
}
VERSIONED = ("lcdist", "torch", "megatron-core", "numpy", "sentencepiece", "triton")


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """Facts about a start that do not change from step to step.

    Attributes:
        plan: rows of the plan's table, name to value, as JSON types.
        device: name of one rank's device.
        peak: `flops` (FLOP/s of one device) and `source`; None if unknown.
        world_size: number of ranks.
        versions: version of each package by name.
        kernels: what computes norms, SwiGLU, loss, updates and weight gradients.
    """

    plan: Mapping[str, Any]
    device: str
    peak: Mapping[str, Any] | None
    world_size: int
    versions: Mapping[str, str]
    kernels: str = ""


@dataclass(frozen=True)
class LostWork:
    """Steps that a start repeats, because they were taken after the checkpoint it resumes from.

    last_seen: end of the last step of an earlier start, in seconds since 1970; None if unknown.
    began: of `process_began`; 0 for a process that trained nothing before.
    """

    steps: int = 0
    seconds: float = 0.0
    last_seen: float | None = None
    began: float = 0.0


NOTHING_LOST = LostWork()


def lost_work(metrics_file: Path, step: int) -> LostWork:
    """Count the steps after `step` in a metrics file; raise ValueError if it is damaged."""
    records = read_records(metrics_file)
    seconds = [record.time.step for record in records if record.step > step]
    return LostWork(len(seconds), sum(seconds), records[-1].wall if records else None)


def record_start(
    folder: Path, header: RunHeader, step: int, reason: str, lost: LostWork = NOTHING_LOST
) -> str:
    """Write run.json, or add a start to it.

    Args:
        folder: run folder.
        header: facts about this start.
        step: steps taken before.
        reason: "new run" or "resumed".
        lost: steps that this start repeats.

    Returns:
        The run's id, the same for all its starts.

    Raises:
        ValueError: an existing run.json is damaged.
    """
    path = folder / HEADER_FILE
    before = read_header(path) if path.exists() else {"id": uuid.uuid4().hex[:12], "starts": []}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"step": step, "time": now, "reason": reason, "world_size": header.world_size}
    start |= {"lost_steps": lost.steps, "lost_seconds": round(lost.seconds, 3)}
    start |= {"began": lost.began or process_began(), "last_seen": lost.last_seen}
    table = {"id": before["id"], "starts": [*before["starts"], start], **asdict(header)}
    write_file(path, json.dumps(table, indent=2, allow_nan=False) + "\n")
    return before["id"]


def record_first_step(folder: Path, step_seconds: float) -> None:
    """Record in run.json how long the last start took until the end of its first step.

    step_seconds: of the step itself.
    """
    seconds = time.time() - read_header(folder / HEADER_FILE)["starts"][-1]["began"]
    _add_to_start(
        folder,
        first_step_seconds=round(seconds, 3),
        before_first_step_seconds=round(max(0.0, seconds - step_seconds), 3),
    )


def record_spent(folder: Path, saving_seconds: float) -> None:
    """Record in run.json when the last start was last seen, and how long it has saved."""
    _add_to_start(folder, ended=time.time(), saving_seconds=round(saving_seconds, 3))


def process_began(earlier_stages: Iterable[Path] = ()) -> float:
    """Return when this process began to work for a run, in seconds since 1970.

    earlier_stages: run folders of stages that this process may have trained before.
    """
    ends = [psutil.Process().create_time()]
    for file in (folder / HEADER_FILE for folder in earlier_stages):
        if file.exists():
            ends += [start["ended"] for start in read_header(file)["starts"] if "ended" in start]
    return max(ends)


def _add_to_start(folder: Path, **facts: float) -> None:
    path = folder / HEADER_FILE
    table = read_header(path)
    table["starts"][-1] |= facts
    write_file(path, json.dumps(table, indent=2, allow_nan=False) + "\n")


def read_header(path: Path) -> dict[str, Any]:
    """Read a run.json; raise ValueError with file and problem if it is damaged."""
    table = read_object(path, {"id": str, "starts": list[dict]}, REMOVE)
    for number, start in enumerate(table["starts"]):
        optional = {key: hint for key, hint in _START_OPTIONAL.items() if key in start}
        check_types(start, _START | optional, f"{path}: starts[{number}]", REMOVE)
    return table


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a run's numbers."""
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        # Some packages come without metadata: built from source, or on a path of their own.
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found

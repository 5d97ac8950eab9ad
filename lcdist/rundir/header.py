"""The header of a run: run.json, which says what was run, on what, with what, and every start."""

import json
import platform
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from lcdist.rundir.paths import HEADER_FILE
from lcdist.rundir.records import read_records
from lcdist.utils.atomic import write_file

VERSIONED = ("lcdist", "torch", "megatron-core", "numpy", "sentencepiece", "triton")


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """What does not change from step to step.

    plan: names and values as a person reads them (JSON types). device: name of one rank's device.
    peak: `flops` (FLOP/s of one device) and `source`, or None. versions: package to version.
    """

    plan: Mapping[str, Any]
    device: str
    peak: Mapping[str, Any] | None
    world_size: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Lost:
    """What a start does again: steps that were taken after the checkpoint it goes on from."""

    steps: int = 0
    seconds: float = 0.0


NOTHING_LOST = Lost()


def lost_since(records: Path, step: int) -> Lost:
    """What the metrics file at `records` tells of after `step`. Raises ValueError as it is read."""
    times = [one.time.step for one in read_records(records) if one.step > step]
    return Lost(len(times), sum(times))


def record_start(
    folder: Path, header: RunHeader, step: int, reason: str, lost: Lost = NOTHING_LOST
) -> str:
    """Write or renew `folder`/run.json and note in it that the run starts after `step`.

    reason: why, in a few words ("new run", "resumed"). Returns the run's id, which stays the same
    over all its starts. Raises ValueError where an existing run.json cannot be read.
    """
    path = folder / HEADER_FILE
    before = read_header(path) if path.exists() else {"id": uuid.uuid4().hex[:12], "starts": []}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"step": step, "time": now, "reason": reason, "world_size": header.world_size}
    start |= {"lost_steps": lost.steps, "lost_seconds": round(lost.seconds, 3)}
    table = {"id": before["id"], "starts": [*before["starts"], start], **asdict(header)}
    write_file(path, json.dumps(table, indent=2, allow_nan=False) + "\n")
    return before["id"]


def record_first_step(folder: Path, seconds: float) -> None:
    """Note in `folder`/run.json how long after its process began the last start took a step."""
    path = folder / HEADER_FILE
    table = read_header(path)
    table["starts"][-1]["first_step_seconds"] = round(seconds, 3)
    write_file(path, json.dumps(table, indent=2, allow_nan=False) + "\n")


def read_header(path: Path) -> dict[str, Any]:
    """The content of a run.json. Raises ValueError naming file, line and what is wrong."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}:1: expected an object, got {type(table).__name__}")
    missing = [key for key in ("id", "starts") if key not in table]
    if missing:
        raise ValueError(f"{path}:1: key {missing[0]!r} is missing; no run wrote this file")
    return table


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that can change a run's numbers."""
    found = {"python": platform.python_version()}
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return found | {name: installed[name] for name in VERSIONED if name in installed}

"""Signal files in the run folder, between a run and batch scripts.

A launcher may fail after its ranks have ended well, so scripts read these files. `DONE`: all
steps are finished. `STOPPED`: the run stopped on request and saved; JSON with step, reason and
checkpoint. Neither file: the start failed. `stop` works the other way: a script or user creates it
to make the run save and end.
"""

import json
from pathlib import Path

from lcdist.utils.atomic import write_file
from lcdist.utils.json_file import read_object

DONE, STOPPED, STOP = "DONE", "STOPPED", "stop"


def clear_signals(folder: Path) -> None:
    """Remove the signals of the previous start; keep a request to stop."""
    for name in (DONE, STOPPED):
        (folder / name).unlink(missing_ok=True)


def steps_done(folder: Path) -> int | None:
    """Return the number of steps after which the run finished; None if it has not finished."""
    file = folder / DONE
    return read_object(file, {"step": int}, "remove it")["step"] if file.exists() else None


def write_done(folder: Path, step: int) -> None:
    """Write DONE after `step` steps, and remove a request to stop."""
    write_file(folder / DONE, json.dumps({"step": step}) + "\n")
    (folder / STOP).unlink(missing_ok=True)


def write_stopped(folder: Path, step: int, reason: str, checkpoint: Path) -> None:
    """Write STOPPED with the checkpoint that was saved, and remove the request to stop."""
    table = {"step": step, "reason": reason, "checkpoint": str(checkpoint)}
    write_file(folder / STOPPED, json.dumps(table) + "\n")
    (folder / STOP).unlink(missing_ok=True)

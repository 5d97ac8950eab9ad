"""Files in the run folder that tell a batch script how a start ended, where exit codes cannot.

A launcher's exit status is 1 whatever its ranks returned, so scripts look here: `DONE`: all steps
are done. `STOPPED`: told to stop, and saved; JSON of step, reason and checkpoint. Neither: it
failed. `stop` is the other direction: whoever makes it asks the run to save and end.
"""

import json
from pathlib import Path

from lcdist.utils.atomic import write_file

DONE, STOPPED, STOP = "DONE", "STOPPED", "stop"


def clear_signals(folder: Path) -> None:
    """A start begins: what the last one left says nothing of it. A request to stop stays."""
    for name in (DONE, STOPPED):
        (folder / name).unlink(missing_ok=True)


def steps_done(folder: Path) -> int | None:
    """After how many steps the run in `folder` was done; None where it is not."""
    file = folder / DONE
    return json.loads(file.read_text(encoding="utf-8"))["step"] if file.exists() else None


def write_done(folder: Path, step: int) -> None:
    """All steps are done."""
    write_file(folder / DONE, json.dumps({"step": step}) + "\n")
    (folder / STOP).unlink(missing_ok=True)


def write_stopped(folder: Path, step: int, reason: str, checkpoint: Path) -> None:
    """Told to stop, and saved as `checkpoint`; the request, now obeyed, is taken away."""
    table = {"step": step, "reason": reason, "checkpoint": str(checkpoint)}
    write_file(folder / STOPPED, json.dumps(table) + "\n")
    (folder / STOP).unlink(missing_ok=True)

"""Record that a run failed, why, and where it goes on."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from lcdist.checkpoint.save import sweep_leftovers
from lcdist.rundir.paths import CHECKPOINTS, CheckpointError
from lcdist.rundir.status import read_status, way_back, write_status


@contextlib.contextmanager
def failure_told(folder: Path, rank: int) -> Iterator[None]:
    """Write status "failed" into the run folder if the block raises; on rank 0 alone.

    The reason says where the run goes on. Leftovers of a save are deleted. Nothing is written for
    a run that has never begun, or whose folder is gone, or on a disk that takes no more.
    """
    try:
        yield
    except BaseException as error:
        if rank == 0:
            with contextlib.suppress(OSError, ValueError):
                _record(error, folder)
        raise


def _record(error: BaseException, folder: Path) -> None:
    status = read_status(folder)
    if status is None:
        return
    # The watchdog has said more about a run that stalled.
    if status["status"] != "stalled":
        write_status(folder, "failed", status["step"], _reason(error, folder))
    sweep_leftovers(folder / CHECKPOINTS)


def _reason(error: BaseException, folder: Path) -> str:
    """Return the error in one line, and where the run goes on."""
    if isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, FloatingPointError | CheckpointError):
        # These messages say where the run goes on.
        return " ".join(str(error).split())
    else:
        text = " ".join("".join(traceback.format_exception_only(error)).split())
    return f"{text}. {way_back(folder)}"

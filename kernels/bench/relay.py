"""Run a list of items in a child process that may die; the next child continues after it.

A kernel with an invalid memory access ends CUDA for its whole process, and a kernel that hangs
takes all the time there is. So the child records each item that it begins, and its parent reports
lost items.
"""

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from place import lost_cuda

T = TypeVar("T")
# Exit statuses of a child that recorded its failure and cannot continue, and of one out of time.
HURT, LATE = 3, 4
TIME_WAS_UP = "time was up"


def take_turns(
    items: Sequence[T], run: Callable[[T], None], first: int, mark: Path, seconds: float
) -> int:
    """In the child: run items from `first` on while there is time; return the exit status."""
    end = time.monotonic() + seconds
    for number, item in enumerate(items[first:], first):
        if time.monotonic() > end:
            return LATE
        mark.write_text(str(number), encoding="utf-8")
        run(item)
        if lost_cuda():
            return HURT
    return 0


def relay(
    child: Sequence[str], mark: Path, log: Path, end: float, lost: Callable[[int, str], None]
) -> bool:
    """In the parent: run `child --first N --seconds S` until all items are done or time is up.

    Args:
        end: a time of `time.monotonic`.
        lost: called as lost(number, why) for each item that did not finish.

    Returns:
        True if all items are done.

    Raises:
        RuntimeError: a child ended before it began an item.
    """
    first = 0
    while (left := end - time.monotonic()) > 0:
        mark.unlink(missing_ok=True)
        status = None
        with log.open("a", encoding="utf-8") as file:
            words = [*child, "--first", str(first), "--seconds", str(left)]
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(timeout=left)
            if status is None:
                process.kill()
                process.wait()
        # A terminal's interrupt reaches parent and child, and must not start the next child.
        if status in (0, LATE, -signal.SIGINT):
            return status == 0
        number = int(mark.read_text(encoding="utf-8")) if mark.exists() else None
        if status is None:
            if number is not None:
                lost(number, TIME_WAS_UP)
            return False
        if number is None:
            tail = " ".join(log.read_text(encoding="utf-8").split()[-40:])
            raise RuntimeError(f"the process ended with {status} before it began: {tail}")
        if status != HURT:
            lost(number, f"its process ended with status {status}")
        first = number + 1
    return False

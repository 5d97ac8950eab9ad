"""A list of things to do in a child process that may die: the next child goes on after it.

A kernel that reads where it must not takes CUDA away from its whole process, and one that hangs,
all the time there is. So the child notes what it begins, and its parent what was lost.
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
# Statuses of a child that noted its failure itself and can do no more, and of one out of time.
HURT, LATE = 3, 4
TIME_WAS_UP = "time was up"


def take_turns(
    items: Sequence[T], run: Callable[[T], None], first: int, mark: Path, seconds: float
) -> int:
    """In the child: runs the items from `first` on while there is time, and gives its status."""
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
    """In the parent: runs `child --first N --seconds S` till all is done, True, or time is up.

    lost(number, why) is told of each item that did not come to its end. end: of `time.monotonic`.
    Raises RuntimeError where a child ends before it begins anything.
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
        # A terminal's interrupt reaches parent and child, which must not be followed by the next.
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

"""The lock of a run folder: one process at a time writes to it, and shows that it lives."""

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import psutil

from lcdist.rundir.paths import LOCK_FILE
from lcdist.utils.json_file import read_object

# The owner sets the time of the lock's file every BEAT seconds. Without a sign of life for SILENCE
# seconds it is taken for dead: a shared file system may show a time half a minute late.
BEAT, SILENCE = 5.0, 90.0
_TYPES = {"process": int, "host": str, "started": float}


@dataclass(frozen=True)
class Owner:
    """The process that holds or held a lock.

    Attributes:
        process: its number.
        host: name of its machine.
        started: when it began, in seconds since 1970; numbers of processes are used again.
    """

    process: int
    host: str
    started: float

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"

    @property
    def is_gone(self) -> bool | None:
        """Return whether the process has ended; None if it belongs to another machine."""
        if self.host != socket.gethostname():
            return None
        try:
            process = psutil.Process(self.process)
            other = abs(process.create_time() - self.started) > 1
            return other or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def read_owner(folder: Path) -> Owner | None:
    """Return who holds or held the lock of `folder`; None if nobody can be named."""
    try:
        table = read_object(folder / LOCK_FILE, _TYPES)
    except (OSError, ValueError):
        return None
    return Owner(table["process"], table["host"], table["started"])


def silence_of(folder: Path, now: float) -> float:
    """Return the seconds since the owner's last sign of life.

    Raises:
        OSError: the folder has no lock.
    """
    return max(0.0, now - (folder / LOCK_FILE).stat().st_mtime)


@contextlib.contextmanager
def lock_run_folder(folder: Path, beat: float = BEAT) -> Iterator[None]:
    """Hold the lock of `folder`; create the folder if needed.

    Args:
        folder: run folder.
        beat: seconds between two signs of life.

    Raises:
        ValueError: the folder cannot be made or written, or another living process holds the lock.
    """
    with _open_lock(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = read_owner(folder) or "another process"
            raise ValueError(
                f"log.folder = '{folder}' is in use by {owner}; "
                "wait for that run, stop it, or choose another log.folder"
            ) from None
        process = psutil.Process()
        owner = Owner(process.pid, socket.gethostname(), process.create_time())
        file.truncate(0)
        file.write(json.dumps(asdict(owner)) + "\n")
        file.flush()
        with _beating(file, beat):
            yield


@contextlib.contextmanager
def _beating(file: TextIO, beat: float) -> Iterator[None]:
    """Set the file's time every `beat` seconds."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(beat):
            # A folder that cannot be written is noticed by those who have something to write.
            with contextlib.suppress(OSError):
                os.utime(file.fileno())

    thread = threading.Thread(target=run, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _open_lock(folder: Path) -> TextIO:
    """Create the folder if needed, and open the file of its lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK_FILE).open("a+")
    except OSError as error:
        reason = error.strerror
        if folder.is_symlink() and not folder.exists():
            reason = "it is a link to a folder that does not exist"
        elif folder.exists() and not folder.is_dir():
            reason = "it is a file"
        raise ValueError(
            f"log.folder = '{folder}' cannot be used ({reason}): correct it, or choose another "
            "log.folder"
        ) from error

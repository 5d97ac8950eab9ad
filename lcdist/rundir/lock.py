"""The lock of a run folder: one process at a time writes to it."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lcdist.rundir.paths import LOCK_FILE


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; create the folder if needed.

    Raises:
        ValueError: the folder cannot be made or written, or another living process holds the lock.
    """
    with _open_lock(folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"log.folder = '{folder}' is in use by {owner}; "
                "wait for that run, stop it, or choose another log.folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


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

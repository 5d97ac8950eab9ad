"""The lock of a run folder: one process at a time writes to it."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lcdist.rundir.paths import LOCK_FILE


@contextlib.contextmanager
def lock_run_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`; create the folder if needed.

    Raises:
        ValueError: another living process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+") as file:
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

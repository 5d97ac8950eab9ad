"""Stop requests: SIGTERM, SIGUSR1, Ctrl-C or a file in the run folder make a run save and end.

A request is noted and takes effect between steps; a second Ctrl-C ends the run at once. The
file is for callers that cannot send signals to the ranks, such as a batch script whose job step a
signal would kill.
"""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

FOLDER_GONE = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TOLD = b"Ctrl-C: the run saves after this step and ends; Ctrl-C again ends it at once\n"


class StopRequests:
    """Context manager that notes the first stop request in `reason`.

    Args:
        files: if one of them exists when `poll` is called, that is a request. The first is in the
            run folder, which has to stay.
        alone: whether this process tells the user what Ctrl-C does; else its launcher does.
    """

    def __init__(self, files: Sequence[Path] = (), alone: bool = False) -> None:
        self.files, self.folder = files, files[0].parent if files else None
        self.reason: str | None = None
        self._alone, self._interrupts = alone, 0
        self._handlers_before: list[object] = []

    def __enter__(self) -> "StopRequests":
        self._handlers_before = [signal.signal(number, self._note) for number in STOP_SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(STOP_SIGNALS, self._handlers_before, strict=True):
            signal.signal(number, handler)  # type: ignore[arg-type]

    def poll(self) -> int:
        """Look at the files; return 1 if a stop has been requested, 2 if the run folder is gone."""
        if self.folder is not None and not self.folder.is_dir():
            return FOLDER_GONE
        for file in self.files if self.reason is None else ():
            if file.exists():
                self.reason = f"the file {file.name}"
        return int(self.reason is not None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                # One more needs no Python to run.
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                raise KeyboardInterrupt
            if self._alone:
                # A handler may run inside a write to sys.stderr.
                os.write(2, TOLD)
        if self.reason is None:
            self.reason = signal.Signals(number).name


def check_folder(request: int, folder: str, step: int) -> None:
    """Raise FileNotFoundError if the run folder is gone.

    Args:
        request: largest answer of `StopRequests.poll` over all ranks.
        folder: log.folder.
        step: steps taken.
    """
    if request == FOLDER_GONE:
        raise FileNotFoundError(
            f"log.folder = '{folder}' was removed while the run trained: it ends after step "
            f"{step}, and nothing is saved"
        )

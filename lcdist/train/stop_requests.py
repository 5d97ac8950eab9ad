"""Stop requests: SIGTERM, SIGUSR1 or a file in the run folder make a run save and end.

A request is noted and takes effect between steps. The file is for callers that cannot send signals
to the ranks, such as a batch script whose job step a signal would kill.
"""

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

FOLDER_GONE = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Context manager that notes the first stop request in `reason`.

    Args:
        files: if one of them exists when `poll` is called, that is a request. The first is in the
            run folder, which has to stay.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self.files, self.folder = files, files[0].parent if files else None
        self.reason: str | None = None
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

"""Stop requests: SIGTERM, SIGUSR1 or a file in the run folder make a run save and end.

A request is noted and takes effect between steps. The file is for callers that cannot send signals
to the ranks, such as a batch script whose job step a signal would kill.
"""

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Context manager that notes the first stop request in `reason`.

    files: if one of them exists when `poll` is called, that is a request.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self.files = files
        self.reason: str | None = None
        self._handlers_before: list[object] = []

    def __enter__(self) -> "StopRequests":
        self._handlers_before = [signal.signal(number, self._note) for number in STOP_SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in zip(STOP_SIGNALS, self._handlers_before, strict=True):
            signal.signal(number, handler)  # type: ignore[arg-type]

    def poll(self) -> bool:
        """Return whether a stop has been requested; checks the files."""
        for file in self.files if self.reason is None else ():
            if file.exists():
                self.reason = f"the file {file.name}"
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name

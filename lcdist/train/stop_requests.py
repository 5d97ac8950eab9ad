"""What asks a run to save and end: SIGTERM, SIGUSR1, or a file in the run folder.

Requests are remembered and obeyed between steps. The file is for whoever cannot reach the ranks
with a signal, as a batch script whose job step would be killed by it.
"""

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """While entered, notes the first request to stop (`reason`) and goes on.

    files: the presence of one is a request, seen when `look` is called.
    """

    def __init__(self, files: Sequence[Path] = ()) -> None:
        self.files = files
        self.reason: str | None = None
        self._before: list[object] = []

    def __enter__(self) -> "StopRequests":
        self._before = [signal.signal(number, self._note) for number in STOPPING]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in zip(STOPPING, self._before, strict=True):
            signal.signal(number, handler)  # type: ignore[arg-type]

    def look(self) -> bool:
        """Whether anything asked to stop, now or before."""
        for file in self.files if self.reason is None else ():
            if file.exists():
                self.reason = f"the file {file.name}"
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name

"""SIGTERM and SIGUSR1 ask a run to save and end; they are remembered, and obeyed between steps."""

import signal
from types import FrameType, TracebackType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """While entered, notes the first stop signal this process gets (`reason`) and goes on."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: list[object] = []

    def __enter__(self) -> "StopSignals":
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name

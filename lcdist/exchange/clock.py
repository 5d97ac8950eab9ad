"""A stopwatch for a device's own time: on CUDA the host runs ahead of what it has asked for."""

import time
from typing import Any

import torch


class Stopwatch:
    """Starts when made; then `stop`, and later `seconds`.

    cuda: times the current stream, not the host.
    """

    def __init__(self, cuda: bool) -> None:
        self._begin, self._end = self._mark(cuda), None
        self._cuda = cuda

    def stop(self) -> None:
        """The end of what is timed; the last call counts."""
        self._end = self._mark(self._cuda)

    @property
    def seconds(self) -> float:
        """Between start and stop; 0 where it was never stopped. On CUDA waits for the stop."""
        if self._end is None:
            return 0.0
        if not self._cuda:
            return self._end - self._begin
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) / 1e3

    @staticmethod
    def _mark(cuda: bool) -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

"""Stopwatch for work on the CPU or on a CUDA stream."""

import time
from typing import Any

import torch


class Stopwatch:
    """Measure the time from construction to `stop`.

    Args:
        cuda: measure the current CUDA stream with events. The host clock would be wrong there,
            because kernel launches return before the work is done.
    """

    def __init__(self, cuda: bool) -> None:
        self._start, self._end = self._record(cuda), None
        self._cuda = cuda

    def stop(self) -> None:
        """Record the end time; a later call replaces it."""
        self._end = self._record(self._cuda)

    @property
    def seconds(self) -> float:
        """Seconds from construction to `stop`; 0 if never stopped. On CUDA, waits for the stop."""
        if self._end is None:
            return 0.0
        if not self._cuda:
            return self._end - self._start
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    @staticmethod
    def _record(cuda: bool) -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

"""Count the bytes that exchanges send, by verb; tests check with it that a shift moves no shard.

The open counters are one list per process. PyTorch runs a CUDA backward pass in its own threads,
which see neither the thread-locals nor the context variables of the thread that counts.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from lcdist.exchange.clock import Stopwatch

VERBS = ("ring", "shift", "gather", "swap")


@dataclass(frozen=True)
class Traffic:
    """Bytes sent and waits recorded while the counter was open.

    Args:
        sent: bytes by verb, forward and backward together.
        waits: one stopwatch for every wait of a real rank for its peers.
    """

    sent: Counter[str] = field(default_factory=Counter)
    waits: list[Stopwatch] = field(default_factory=list)

    @property
    def seconds_waited(self) -> float:
        """Seconds that this rank waited for its peers."""
        return sum(watch.seconds for watch in self.waits)

    @property
    def total(self) -> int:
        """Bytes of all verbs."""
        return self.sent.total()


class _OpenCounters:
    """The counters open in this process, each with the thread that opened it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[Traffic, threading.Thread]] = []
        self._thread_local = threading.local()

    def start(self, traffic: Traffic) -> None:
        with self._lock:
            self._open.append((traffic, threading.current_thread()))

    def stop(self, traffic: Traffic) -> None:
        with self._lock:
            self._open = [entry for entry in self._open if entry[0] is not traffic]

    def thread_ancestry(self) -> tuple[threading.Thread, ...]:
        """Return the current thread and the threads that started it as a virtual rank."""
        return (threading.current_thread(), *getattr(self._thread_local, "parents", ()))

    def set_parents(self, parents: tuple[threading.Thread, ...]) -> None:
        self._thread_local.parents = parents

    def add_sent(self, verb: str, num_bytes: int, virtual: bool) -> None:
        with self._lock:
            ancestry = (*self.thread_ancestry(), threading.main_thread())
            for traffic, opener in self._open:
                # All threads of a real rank belong to that rank; a virtual rank is one thread.
                if not virtual or opener in ancestry:
                    traffic.sent[verb] += num_bytes

    def add_wait(self, watch: Stopwatch) -> None:
        with self._lock:
            for traffic, _ in self._open:
                traffic.waits.append(watch)


_COUNTERS = _OpenCounters()


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count the bytes this rank sends inside the block, by verb: `t.sent["ring"]`, `t.total`.

    Only bytes that leave for other ranks count. An all-gather counts (n - 1) shards per rank, a
    reduce-scatter (n - 1) of its parts, an all-to-all its pieces for other ranks. Gradients count
    under the verb of their forward pass.

    Opened by a virtual rank, it counts that rank. Opened in the thread that runs the group, or in
    the main thread, it counts all of the group's ranks together.
    """
    counter = Traffic()
    _COUNTERS.start(counter)
    try:
        yield counter
    finally:
        _COUNTERS.stop(counter)


def record_sent(verb: str, num_bytes: int, virtual: bool) -> None:
    """Add `num_bytes` of `verb` to every open counter that this thread's rank belongs to."""
    assert verb in VERBS, verb
    _COUNTERS.add_sent(verb, num_bytes, virtual)


def record_wait(watch: Stopwatch) -> None:
    """Add a finished wait of a real rank to every open counter."""
    _COUNTERS.add_wait(watch)


def thread_ancestry() -> tuple[threading.Thread, ...]:
    """Return the ancestry for `set_parents`; call it in the thread that starts virtual ranks."""
    return _COUNTERS.thread_ancestry()


def set_parents(parents: tuple[threading.Thread, ...]) -> None:
    """Let counters opened in `parents` count the bytes that this virtual rank's thread sends."""
    _COUNTERS.set_parents(parents)

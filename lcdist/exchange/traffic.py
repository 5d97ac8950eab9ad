"""Counts the bytes that exchanges send, by verb: how a test knows that a shift moved no shard.

The open counters are the one list of this process: PyTorch runs a CUDA backward in threads of its
own, which see neither the thread-locals nor the context variables of the thread that counts.
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
    """What was sent while it was open. sent: bytes by verb, forward and backward together.

    waits: a stopwatch for every wait of a real rank for its peers.
    """

    sent: Counter[str] = field(default_factory=Counter)
    waits: list[Stopwatch] = field(default_factory=list)

    @property
    def seconds_waited(self) -> float:
        """How long this rank waited for its peers."""
        return sum(watch.seconds for watch in self.waits)

    @property
    def total(self) -> int:
        """Bytes of all verbs."""
        return self.sent.total()


class _OpenCounters:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[tuple[Traffic, threading.Thread]] = []
        self._here = threading.local()

    def start(self, traffic: Traffic) -> None:
        with self._lock:
            self._open.append((traffic, threading.current_thread()))

    def stop(self, traffic: Traffic) -> None:
        with self._lock:
            self._open = [entry for entry in self._open if entry[0] is not traffic]

    def lineage(self) -> tuple[threading.Thread, ...]:
        """The current thread and those that started it as virtual ranks."""
        return (threading.current_thread(), *getattr(self._here, "parents", ()))

    def adopt(self, parents: tuple[threading.Thread, ...]) -> None:
        self._here.parents = parents

    def add(self, verb: str, sent: int, virtual: bool) -> None:
        with self._lock:
            mine = (*self.lineage(), threading.main_thread())
            for traffic, opener in self._open:
                # All threads of a real rank are that rank; a virtual rank is one thread.
                if not virtual or opener in mine:
                    traffic.sent[verb] += sent

    def add_wait(self, watch: Stopwatch) -> None:
        with self._lock:
            for traffic, _ in self._open:
                traffic.waits.append(watch)


_COUNTERS = _OpenCounters()


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Counts the bytes this rank sends inside the block, by verb: `t.sent["ring"]`, `t.total`.

    Bytes leave for other ranks; what a rank keeps costs nothing. An all-gather counts (n - 1)
    shards a rank, a reduce-scatter (n - 1) of its parts, an all-to-all what goes to others.
    Gradients count under the verb of their forward pass.

    Opened by a virtual rank it counts that rank; opened in the thread that runs the group, or in
    the main thread, all of its ranks together.
    """
    counted = Traffic()
    _COUNTERS.start(counted)
    try:
        yield counted
    finally:
        _COUNTERS.stop(counted)


def count(verb: str, sent: int, virtual: bool) -> None:
    """Adds `sent` bytes of `verb` to every open counter that this thread's rank belongs to."""
    assert verb in VERBS, verb
    _COUNTERS.add(verb, sent, virtual)


def waited(watch: Stopwatch) -> None:
    """Adds a real rank's wait, now over, to every open counter."""
    _COUNTERS.add_wait(watch)


def lineage() -> tuple[threading.Thread, ...]:
    """What a virtual rank's thread passes to `adopt`: taken in the thread that starts it."""
    return _COUNTERS.lineage()


def adopt(parents: tuple[threading.Thread, ...]) -> None:
    """Lets counters opened in `parents` count what this thread sends as a virtual rank."""
    _COUNTERS.adopt(parents)

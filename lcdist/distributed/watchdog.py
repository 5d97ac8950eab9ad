"""Watchdog: report which ranks wait and which are missing when a run makes no progress, and end it.

Every rank has a thread that writes a heartbeat to a store that all ranks share: a counter, the
step, and the rank's location once it has been idle for a while. A rank that has been idle for too
long reads the store twice; ranks whose counter rose in between are alive. The lowest living rank
reports, and all ranks end, because a collective that one rank never joins cannot be left in any
other way.
"""

import json
import logging
import os
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import psutil

from lcdist.distributed.stack_probe import RankLocation, locate_rank

log = logging.getLogger(__name__)
T = TypeVar("T")

EXIT_STATUS = 70
# A step may take this many times as long as the longest step so far.
LONGEST_STEP_FACTOR = 5.0
NOWHERE = RankLocation("", "", "")


@dataclass(frozen=True)
class Heartbeat:
    """One rank's entry in the store.

    `idle` is the time in seconds since the rank last made progress; `host`, `pid` and `parent`
    (a process id) identify its process.
    """

    count: int
    step: int
    phase: str
    idle: float
    location: RankLocation
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    parent: int = field(default_factory=os.getppid)

    def to_json(self) -> str:
        """Return the heartbeat as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Read what `to_json` returned."""
        table = json.loads(text)
        return cls(**(table | {"location": RankLocation(**table["location"])}))


class Watchdog:
    """Context manager that watches this rank; `record_progress` tells it about progress.

    Args:
        store: a torch Store of this watchdog's own; None: do not watch.
        rank: of this process.
        world_size: number of ranks.
        stall_limit: seconds without progress that are too many, once a step has been taken.
        slow_limit: the same limit before the first step, and in phases that are marked as slow.
        step: steps taken before.
        methods: name of an attention method by the module of its `attention`.
        on_stall: called with the report, on one rank.
    """

    def __init__(  # noqa: PLR0913
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        stall_limit: float,
        slow_limit: float,
        step: int,
        methods: Mapping[str, str],
        on_stall: Callable[[str], None],
    ) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        self.stall_limit, self.slow_limit = stall_limit, max(stall_limit, slow_limit)
        self.methods, self.on_stall = methods, on_stall
        self.interval = min(5.0, stall_limit / 4)
        self._count, self._step, self._steps_taken, self._phase = 0, step, 0, "starting"
        self._last_progress = time.monotonic()
        self._step_start = self._last_progress
        self._limit, self._longest_step = self.slow_limit, 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._last_progress = self._step_start = time.monotonic()
        if self.store is not None:
            self._send_heartbeat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()

    def record_progress(self, step: int, phase: str, slow: bool = False) -> None:
        """Record that this rank has taken `step` steps and begins `phase`.

        Args:
            step: steps taken so far.
            phase: name for the report.
            slow: whether the phase may take as long as the first step.
        """
        now = time.monotonic()
        if step > self._step:
            if self._steps_taken:
                # The first step does not count: it compiles kernels.
                self._longest_step = max(self._longest_step, now - self._step_start)
            self._steps_taken, self._step_start = self._steps_taken + 1, now
        self._limit = self.slow_limit
        if self._steps_taken and not slow:
            self._limit = max(self.stall_limit, LONGEST_STEP_FACTOR * self._longest_step)
        self._step, self._phase, self._last_progress = step, phase, now

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(self.interval):
                if self._send_heartbeat().idle > self._limit:
                    self._end_run()
        except RuntimeError as error:
            # The process that hosted the store is gone: the launcher ends the run.
            log.warning("the watchdog has lost its store: %s", error)

    def _send_heartbeat(self) -> Heartbeat:
        idle = time.monotonic() - self._last_progress
        location = locate_rank(self.methods) if idle > self._limit / 2 else NOWHERE
        self._count += 1
        heartbeat = Heartbeat(self._count, self._step, self._phase, idle, location)
        self.store.set(_key(self.rank), heartbeat.to_json())
        return heartbeat

    def _read_heartbeats(self) -> list[Heartbeat | None]:
        keys = [_key(rank) for rank in range(self.world_size)]
        exists = [self.store.check([key]) for key in keys]
        return [
            Heartbeat.from_json(self.store.get(key)) if found else None
            for key, found in zip(keys, exists, strict=True)
        ]

    def _end_run(self) -> None:
        """Report the stall and end this process; return only if this rank made progress."""
        self._await_heartbeats()
        before = self._read_heartbeats()
        self._await_heartbeats()
        after = self._read_heartbeats()
        if time.monotonic() - self._last_progress <= self._limit or self._stopped.is_set():
            return
        alive = [
            rank
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if new is not None and (old is None or new.count > old.count)
        ]
        if self.rank == min(alive, default=self.rank):
            names = ", ".join(dict.fromkeys(self.methods.values()))
            self.on_stall(stall_report(after, alive, self._step, names))
        else:
            # The launcher ends all ranks when the first one ends, so the reporting rank goes first.
            self._stopped.wait(6 * self.interval)
        for rank, heartbeat in enumerate(after):
            if heartbeat is not None and rank not in alive:
                kill_sibling(heartbeat)
        os._exit(EXIT_STATUS)

    def _await_heartbeats(self) -> None:
        """Wait long enough for every living rank to send another heartbeat."""
        for _ in range(3):
            self._stopped.wait(self.interval)
            self._send_heartbeat()


def kill_sibling(heartbeat: Heartbeat) -> bool:
    """Kill the process of `heartbeat` if this process's launcher started it.

    A frozen rank does not react to its launcher, which would wait for it long after all other
    ranks have ended.

    Returns:
        Whether it was killed.
    """
    if heartbeat.host != socket.gethostname() or heartbeat.parent != os.getppid():
        return False
    try:
        if psutil.Process(heartbeat.pid).ppid() != heartbeat.parent:
            return False  # The rank has ended, and another process has its number.
        os.kill(heartbeat.pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    return True


class ObservedSequence(Sequence[T]):
    """The items of a sequence; iteration calls `before_item` before it yields each item."""

    def __init__(self, items: Sequence[T], before_item: Callable[[], None]) -> None:
        self._items, self._before_item = items, before_item

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[T]:
        for item in self._items:
            self._before_item()
            yield item


def stall_report(
    heartbeats: Sequence[Heartbeat | None], alive: Sequence[int], step: int, attention: str
) -> str:
    """Return a text that says which ranks wait in which collective, and which are missing.

    Args:
        heartbeats: the last one of each rank, None if it never sent any.
        alive: ranks that still send heartbeats.
        step: steps taken.
        attention: names of the run's attention methods.
    """
    waiting: dict[str, list[int]] = defaultdict(list)
    missing: list[str] = []
    for rank, heartbeat in enumerate(heartbeats):
        if heartbeat is None:
            missing.append(f"rank {rank} has never sent a heartbeat")
        elif rank not in alive:
            missing.append(
                f"rank {rank} sends no heartbeat: its process or machine is frozen; last seen at "
                f"step {heartbeat.step}, {heartbeat.phase}"
            )
        elif heartbeat.location.collective:
            waiting[_collective_text(heartbeat)].append(rank)
        else:
            place = heartbeat.location.place or heartbeat.phase
            missing.append(f"rank {rank} is alive but in no collective: {place}")
    living = [heartbeat for rank in alive if (heartbeat := heartbeats[rank]) is not None]
    idle = max((heartbeat.idle for heartbeat in living), default=0.0)
    lines = [f"no progress in step {step + 1} for {idle:.0f} s (attention: {attention})"]
    lines += [f"waiting: {_rank_list(ranks)} in {text}" for text, ranks in waiting.items()]
    if len(waiting) > 1:
        lines.append("the waiting ranks are in different collectives")
    lines += [f"missing: {text}" for text in missing]
    return "\n".join(lines)


def _collective_text(heartbeat: Heartbeat) -> str:
    location = heartbeat.location
    method = f", attention method {location.method}" if location.method else ""
    return f"{location.collective} at {location.place}{method} ({heartbeat.phase})"


def _rank_list(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _key(rank: int) -> str:
    return f"beat/{rank}"

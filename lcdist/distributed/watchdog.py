"""The watchdog: when a run stops moving, it says who waits where and who is missing, and ends it.

Every rank has a thread that puts a beat on a board all ranks can read: how often it has beaten,
its step, and, once it has not moved for a while, where it is. A rank that has not moved for too
long reads the board twice; who beat in between is alive. The first rank alive tells what it sees,
and all end, since a collective that one rank never joins cannot be left in any other way.
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
# Of the longest step so far: what is no stall though it takes long.
PATIENCE = 5.0


@dataclass(frozen=True)
class Beat:
    """One rank's entry on the board. idle: seconds since it last moved; host, pid, parent: of its
    process."""

    count: int
    step: int
    doing: str
    idle: float
    where: RankLocation
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    parent: int = field(default_factory=os.getppid)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Beat":
        table = json.loads(text)
        return cls(**(table | {"where": RankLocation(**table["where"])}))


NOWHERE = RankLocation("", "", "")


class Watchdog:
    """While entered, watches this rank; `moved` tells it of progress.

    board: a torch Store of this watchdog's own, or None: nobody watches. stall: seconds without
    progress that are too many, once a step has been taken; patient: before that, and where `moved`
    is told so. step: where the run stands. methods: as `whereabouts` takes them. tell: called with
    the report, on one rank.
    """

    def __init__(  # noqa: PLR0913
        self,
        board: Any,
        rank: int,
        world_size: int,
        *,
        stall: float,
        patient: float,
        step: int,
        methods: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> None:
        self.board, self.rank, self.world_size = board, rank, world_size
        self.stall, self.patient = stall, max(stall, patient)
        self.methods, self.tell = methods, tell
        self.interval = min(5.0, stall / 4)
        self._count, self._step, self._steps, self._doing = 0, step, 0, "starting"
        self._moved = time.monotonic()
        self._step_begun = self._moved
        self._limit, self._longest = self.patient, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._moved = self._step_begun = time.monotonic()
        if self.board is not None:
            self._beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def moved(self, step: int, doing: str, patiently: bool = False) -> None:
        """This rank is at `step` and begins `doing`; patiently: it may take as long as the first
        step may."""
        now = time.monotonic()
        if step > self._step:
            if self._steps:
                # The first one compiles kernels.
                self._longest = max(self._longest, now - self._step_begun)
            self._steps, self._step_begun = self._steps + 1, now
        self._limit = self.patient
        if self._steps and not patiently:
            self._limit = max(self.stall, PATIENCE * self._longest)
        self._step, self._doing, self._moved = step, doing, now

    def _watch(self) -> None:
        try:
            while not self._over.wait(self.interval):
                if self._beat().idle > self._limit:
                    self._bark()
        except RuntimeError as error:
            # The board went with the process that kept it: the launcher ends the run.
            log.warning("the watchdog has lost its board: %s", error)

    def _beat(self) -> Beat:
        idle = time.monotonic() - self._moved
        where = locate_rank(self.methods) if idle > self._limit / 2 else NOWHERE
        self._count += 1
        beat = Beat(self._count, self._step, self._doing, idle, where)
        self.board.set(_key(self.rank), beat.to_json())
        return beat

    def _read(self) -> list[Beat | None]:
        keys = [_key(rank) for rank in range(self.world_size)]
        there = [self.board.check([key]) for key in keys]
        return [
            Beat.from_json(self.board.get(key)) if found else None
            for key, found in zip(keys, there, strict=True)
        ]

    def _bark(self) -> None:
        """Does not return, unless this rank moved after all."""
        self._rest()
        before = self._read()
        self._rest()
        after = self._read()
        if time.monotonic() - self._moved <= self._limit or self._over.is_set():
            return
        alive = [
            rank
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if new is not None and (old is None or new.count > old.count)
        ]
        if self.rank == min(alive, default=self.rank):
            names = ", ".join(dict.fromkeys(self.methods.values()))
            self.tell(report(after, alive, self._step, names))
        else:
            # The launcher ends everybody when the first one ends: the one that tells.
            self._over.wait(6 * self.interval)
        for rank, beat in enumerate(after):
            if beat is not None and rank not in alive:
                end_sibling(beat)
        os._exit(EXIT_STATUS)

    def _rest(self) -> None:
        """Long enough for every living rank to beat again."""
        for _ in range(3):
            self._over.wait(self.interval)
            self._beat()


def end_sibling(beat: Beat) -> bool:
    """Kill the process of `beat` where this process's launcher started it; whether it did.

    A frozen rank does not hear its launcher, which would wait for it long after all others ended.
    """
    if beat.host != socket.gethostname() or beat.parent != os.getppid():
        return False
    try:
        if psutil.Process(beat.pid).ppid() != beat.parent:
            return False  # gone, and its number is another's
        os.kill(beat.pid, signal.SIGKILL)
    except (psutil.NoSuchProcess, ProcessLookupError):
        return False
    return True


class Noted(Sequence[T]):
    """The same items; `note` is called whenever one is drawn in order."""

    def __init__(self, items: Sequence[T], note: Callable[[], None]) -> None:
        self._items, self._note = items, note

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[T]:
        for item in self._items:
            self._note()
            yield item


def report(beats: Sequence[Beat | None], alive: Sequence[int], step: int, attention: str) -> str:
    """What the board says, for people: who waits where, and who is not there.

    step: steps taken. attention: the methods of the run.
    """
    waiting: dict[str, list[int]] = defaultdict(list)
    missing: list[str] = []
    for rank, beat in enumerate(beats):
        if beat is None:
            missing.append(f"rank {rank} has never been heard of")
        elif rank not in alive:
            missing.append(
                f"rank {rank} shows no sign of life: frozen, or its machine is; last heard of at "
                f"step {beat.step}, {beat.doing}"
            )
        elif beat.where.collective:
            waiting[_said(beat)].append(rank)
        else:
            place = beat.where.place or beat.doing
            missing.append(f"rank {rank} is alive and in no collective: {place}")
    idle = max((beats[rank].idle for rank in alive if beats[rank]), default=0.0)  # type: ignore[union-attr]
    lines = [f"the run stands still in step {step + 1} since {idle:.0f} s (attention: {attention})"]
    lines += [f"arrived: {_ranks(ranks)} in {said}" for said, ranks in waiting.items()]
    if len(waiting) > 1:
        lines.append("the ranks that arrived are not in the same collective")
    lines += [f"not arrived: {one}" for one in missing]
    return "\n".join(lines)


def _said(beat: Beat) -> str:
    method = f", attention method {beat.where.method}" if beat.where.method else ""
    return f"{beat.where.collective} at {beat.where.place}{method} ({beat.doing})"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:16]))
    more = f" and {len(ranks) - 16} more" if len(ranks) > 16 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"


def _key(rank: int) -> str:
    return f"beat/{rank}"

"""The watchdog: its report, its limits, and the location of a thread."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lcdist.distributed.stack_probe import RankLocation, locate_rank
from lcdist.distributed.watchdog import (
    Heartbeat,
    ObservedSequence,
    Watchdog,
    kill_sibling,
    stall_report,
)
from lcdist.exchange import VirtualGroup, group_rank, ring

METHODS = {"lcdist.attention.scca.attention": "scca"}


def heartbeat(count: int = 9, collective: str = "", place: str = "", method: str = "") -> Heartbeat:
    return Heartbeat(count, 17, "optimizer", 33.0, RankLocation(collective, place, method))


def test_report_names_waiting_and_missing_ranks() -> None:
    waiting = heartbeat(
        collective="ring (arrive)", place="lcdist/exchange/ring.py:9", method="scca"
    )
    heartbeats = [
        waiting,
        heartbeat(),
        waiting,
        heartbeat(place="lcdist/data/loader.py:7 in draw"),
        None,
    ]
    lines = stall_report(heartbeats, [0, 2, 3], 17, "scca").splitlines()
    assert lines == [
        "no progress in step 18 for 33 s (attention: scca)",
        "waiting: ranks 0, 2 in ring (arrive) at lcdist/exchange/ring.py:9, attention method scca "
        "(optimizer)",
        "missing: rank 1 sends no heartbeat: its process or machine is frozen; last seen at "
        "step 17, optimizer",
        "missing: rank 3 is alive but in no collective: lcdist/data/loader.py:7 in draw",
        "missing: rank 4 has never sent a heartbeat",
    ]


def test_report_separates_ranks_in_different_collectives() -> None:
    heartbeats = [
        heartbeat(collective="all_reduce", place="a"),
        heartbeat(collective="broadcast", place="b"),
    ]
    text = stall_report(heartbeats, [0, 1], 3, "full")
    assert "waiting: rank 0 in all_reduce at a" in text
    assert "waiting: rank 1 in broadcast at b" in text
    assert "in different collectives" in text


def test_heartbeat_survives_json() -> None:
    original = heartbeat(collective="swap (arrive)")
    assert Heartbeat.from_json(original.to_json()) == original


def test_locate_rank_finds_a_thread_that_waits_in_an_exchange() -> None:
    # Rank 0 waits in the ring until rank 1 joins it.
    found: list[RankLocation] = []

    def run_rank(rank: Any) -> None:
        if group_rank(rank) == 0:
            for _ in ring(torch.zeros(1, 4, 1, 2), rank):
                pass
        else:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                found[:] = [locate_rank(METHODS)]
                if found[0].collective.startswith("ring ("):
                    break
                time.sleep(0.01)
            for _ in ring(torch.zeros(1, 4, 1, 2), rank):
                pass

    VirtualGroup(2).run(run_rank)
    assert found[0].collective.startswith("ring (")
    assert found[0].place.startswith("lcdist/exchange/")


def make_watchdog(store: Any, reports: list[str], **options: Any) -> Watchdog:
    given: dict[str, Any] = {"stall_limit": 0.2, "slow_limit": 0.4, "step": 0, "methods": {}}
    return Watchdog(store, 0, 1, **(given | options), on_stall=reports.append)


def test_watchdog_leaves_a_rank_with_progress_alone(monkeypatch: Any) -> None:
    ended: list[int] = []
    monkeypatch.setattr("lcdist.distributed.watchdog.os._exit", ended.append)
    reports: list[str] = []
    # The limit is five times what a step sleeps, because a busy machine may delay this process.
    # Without progress it would end after the limit and six waits of a quarter of it: 1.25 s.
    limits = {"stall_limit": 0.5, "slow_limit": 0.5}
    with make_watchdog(dist.HashStore(), reports, **limits) as dog:  # pyright: ignore[reportPrivateImportUsage]
        for step in range(30):
            dog.record_progress(step, "forward and backward")
            time.sleep(0.1)
    assert reports == [] and ended == []


def test_watchdog_ends_a_rank_without_progress(monkeypatch: Any) -> None:
    ended: list[int] = []
    monkeypatch.setattr("lcdist.distributed.watchdog.os._exit", ended.append)
    reports: list[str] = []
    with make_watchdog(dist.HashStore(), reports) as dog:  # pyright: ignore[reportPrivateImportUsage]
        dog.record_progress(1, "forward and backward")
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended[0] == 70
    assert reports[0].startswith("no progress in step 2 for ")


def test_first_step_and_save_have_the_slow_limit() -> None:
    dog = make_watchdog(None, [], stall_limit=1.0, slow_limit=50.0)
    assert dog._limit == 50.0
    dog.record_progress(0, "loading data")
    assert dog._limit == 50.0, "no step yet"
    dog.record_progress(1, "optimizer")
    assert dog._limit == 1.0
    dog.record_progress(1, "saving", slow=True)
    assert dog._limit == 50.0
    dog._step_start -= 3.0
    dog.record_progress(2, "loading data")
    assert 15.0 <= dog._limit < 16.0, "five times the longest step"


def test_observed_sequence_calls_before_each_item() -> None:
    seen: list[int] = []
    observed = ObservedSequence([1, 2, 3], lambda: seen.append(len(seen)))
    assert (len(observed), observed[1], seen) == (3, 2, [])
    assert [*observed] == [1, 2, 3] and seen == [0, 1, 2]


SIBLING = """
import sys
from tests.train.test_watchdog import heartbeat
from dataclasses import replace
from lcdist.distributed.watchdog import kill_sibling
words = {key: type(getattr(heartbeat(), key))(value) for key, value in
         (word.split("=") for word in sys.argv[2:])}
sys.exit(kill_sibling(replace(heartbeat(), pid=int(sys.argv[1]), **words)))
"""


@pytest.mark.parametrize(
    ("words", "ended"),
    [((), True), (("host=elsewhere",), False), (("parent=1",), False)],
    ids=["ours", "another host's", "another launcher's"],
)
def test_kill_sibling_ends_a_frozen_rank_of_the_same_launcher(
    words: tuple[str, ...], ended: bool
) -> None:
    # Both are children of this process, as ranks are of their launcher.
    with subprocess.Popen(["sleep", "60"]) as frozen:
        os.kill(frozen.pid, signal.SIGSTOP)
        try:
            told = subprocess.run(
                [sys.executable, "-c", SIBLING, str(frozen.pid), *words], check=False, timeout=60
            )
            assert bool(told.returncode) is ended
            assert (frozen.wait(10) == -signal.SIGKILL) if ended else frozen.poll() is None
        finally:
            frozen.kill()


def test_kill_sibling_leaves_other_processes_alone() -> None:
    # Process 1 is not a child of our launcher, and a process that has ended cannot be killed.
    assert not kill_sibling(replace(heartbeat(), pid=1))
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert not kill_sibling(replace(heartbeat(), pid=gone.pid))

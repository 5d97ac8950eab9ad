"""The watchdog's report, and where a thread is found to be."""

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
from lcdist.distributed.watchdog import Beat, Noted, Watchdog, end_sibling, report
from lcdist.exchange import VirtualGroup, group_rank, ring

METHODS = {"lcdist.attention.scca.attention": "scca"}


def beat(count: int = 9, collective: str = "", place: str = "", method: str = "") -> Beat:
    return Beat(count, 17, "optimizer", 33.0, RankLocation(collective, place, method))


def test_the_report_names_who_is_where_and_who_is_missing() -> None:
    ring_beat = beat(collective="ring (arrive)", place="lcdist/exchange/ring.py:9", method="scca")
    beats = [ring_beat, beat(), ring_beat, beat(place="lcdist/data/loader.py:7 in draw"), None]
    lines = report(beats, [0, 2, 3], 17, "scca").splitlines()
    assert lines == [
        "the run stands still in step 18 since 33 s (attention: scca)",
        "arrived: ranks 0, 2 in ring (arrive) at lcdist/exchange/ring.py:9, attention method scca "
        "(optimizer)",
        "not arrived: rank 1 shows no sign of life: frozen, or its machine is; last heard of at "
        "step 17, optimizer",
        "not arrived: rank 3 is alive and in no collective: lcdist/data/loader.py:7 in draw",
        "not arrived: rank 4 has never been heard of",
    ]


def test_ranks_in_different_collectives_are_told_apart() -> None:
    beats = [beat(collective="all_reduce", place="a"), beat(collective="broadcast", place="b")]
    said = report(beats, [0, 1], 3, "full")
    assert "arrived: rank 0 in all_reduce at a" in said
    assert "arrived: rank 1 in broadcast at b" in said
    assert "not in the same collective" in said


def test_beats_survive_the_board() -> None:
    one = beat(collective="swap (arrive)")
    assert Beat.from_json(one.to_json()) == one


def test_a_thread_that_waits_in_an_exchange_is_found() -> None:
    # Rank 1 never joins the ring: rank 0 waits in it.
    found: list[RankLocation] = []

    def one(rank: Any) -> None:
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

    VirtualGroup(2).run(one)
    assert found[0].collective.startswith("ring (")
    assert found[0].place.startswith("lcdist/exchange/")


def watchdog(board: Any, told: list[str], **words: Any) -> Watchdog:
    given: dict[str, Any] = {"stall": 0.2, "patient": 0.4, "step": 0, "methods": {}} | words
    return Watchdog(board, 0, 1, **given, tell=told.append)


def test_who_moves_is_left_alone(monkeypatch: Any) -> None:
    ended: list[int] = []
    monkeypatch.setattr("lcdist.distributed.watchdog.os._exit", ended.append)
    told: list[str] = []
    # Five times what a step sleeps: this process may be kept from moving for a while. One that does
    # not move would have ended after the limit and six rests of a quarter of it, in 1.25 s.
    more = {"stall": 0.5, "patient": 0.5}
    with watchdog(dist.HashStore(), told, **more) as dog:  # pyright: ignore[reportPrivateImportUsage]
        for step in range(30):
            dog.moved(step, "forward and backward")
            time.sleep(0.1)
    assert told == [] and ended == []


def test_who_stands_still_ends(monkeypatch: Any) -> None:
    ended: list[int] = []
    monkeypatch.setattr("lcdist.distributed.watchdog.os._exit", ended.append)
    told: list[str] = []
    with watchdog(dist.HashStore(), told) as dog:  # pyright: ignore[reportPrivateImportUsage]
        dog.moved(1, "forward and backward")
        deadline = time.monotonic() + 20
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
    assert ended[0] == 70
    assert told[0].startswith("the run stands still in step 2 since ")


def test_a_first_step_and_a_save_may_take_longer() -> None:
    dog = watchdog(None, [], stall=1.0, patient=50.0)
    assert dog._limit == 50.0
    dog.moved(0, "loading data")
    assert dog._limit == 50.0, "no step yet"
    dog.moved(1, "optimizer")
    assert dog._limit == 1.0
    dog.moved(1, "saving", patiently=True)
    assert dog._limit == 50.0
    dog._step_begun -= 3.0
    dog.moved(2, "loading data")
    assert 15.0 <= dog._limit < 16.0, "five times the longest step"


def test_draws_are_noted_in_order() -> None:
    seen: list[int] = []
    noted = Noted([1, 2, 3], lambda: seen.append(len(seen)))
    assert (len(noted), noted[1], seen) == (3, 2, [])
    assert [*noted] == [1, 2, 3] and seen == [0, 1, 2]


SIBLING = """
import sys
from tests.train.test_watchdog import beat
from dataclasses import replace
from lcdist.distributed.watchdog import end_sibling
words = {key: type(getattr(beat(), key))(value) for key, value in
         (word.split("=") for word in sys.argv[2:])}
sys.exit(end_sibling(replace(beat(), pid=int(sys.argv[1]), **words)))
"""


@pytest.mark.parametrize(
    ("words", "ended"),
    [((), True), (("host=elsewhere",), False), (("parent=1",), False)],
    ids=["ours", "another host's", "another launcher's"],
)
def test_a_frozen_rank_of_the_same_launcher_is_ended(words: tuple[str, ...], ended: bool) -> None:
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


def test_a_process_that_took_the_number_of_a_rank_is_left_alone() -> None:
    # This process is not its parent's child under the number of another, nor is one long gone.
    assert not end_sibling(replace(beat(), pid=1))
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    assert not end_sibling(replace(beat(), pid=gone.pid))

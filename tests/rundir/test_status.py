"""`lcdist status`: how a run stands, from its folder alone."""

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lcdist.commands.main import main
from lcdist.rundir.effective import EffectiveTime, effective_time
from lcdist.rundir.lock import lock_run_folder
from lcdist.rundir.records import RankTimes, StepRecord, StepTime, read_records
from lcdist.rundir.run_config import write_config
from lcdist.rundir.signals import write_done, write_stopped
from lcdist.rundir.status import describe, duration, stage_folders, write_status
from tests.model.small import small

NOW = 1_700_000_000.0


def record(step: int, ago: float, slowest: int = 2) -> str:
    return StepRecord(
        step=step,
        samples=4 * step,
        tokens=100,
        loss=3.25,
        grad_norm=1.0,
        lr=1e-3,
        tokens_per_second=50.0,
        mfu_full=None,
        mfu_causal=None,
        memory_bytes=1,
        exchange_bytes={},
        time=StepTime(step=2.0, data=0.1, forward_backward=1.0, optimizer=0.5),
        wall=NOW - ago,
        ranks=RankTimes(least=1.0, most=1.5, slowest=slowest),
    ).to_json()


def own(folder: Path, **other: Any) -> None:
    """Let this process be the owner, with what is different about it."""
    process = {"process": os.getpid(), "started": psutil.Process().create_time()}
    table = {"host": socket.gethostname(), **process, **other}
    (folder / "lock").write_text(json.dumps(table))
    os.utime(folder / "lock", (NOW - 2, NOW - 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_config(tmp_path, small(f"log.folder={tmp_path}", "train.steps=100"))
    write_status(tmp_path, "running", 0, "resumed")
    own(tmp_path)
    lines = [record(step, 2.0 * (40 - step)) for step in range(1, 41)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "checkpoints" / "step_00000030").mkdir(parents=True)
    starts = [
        {"step": 0, "time": "2023-11-14T20:00:00+00:00", "lost_steps": 0, "lost_seconds": 0.0},
        {"step": 30, "time": "2023-11-14T22:00:00+00:00", "lost_steps": 7, "lost_seconds": 14.0,
         "first_step_seconds": 61.0},
    ]  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps({"id": "x", "starts": starts}))
    return tmp_path


def test_status_of_a_running_run_shows_every_row(folder: Path) -> None:
    assert dict(describe(folder, NOW)) == {
        "state": "running: resumed",
        "progress": "step 40 of 100 (40.0 %)",
        "loss": "3.2500",
        "speed": "50 tokens/s, 2 s a step",
        "time left": "2 min, until 2023-11-14 22:15 UTC",
        "slowest rank": "2, with 1.50 times the fastest's own work",
        "last checkpoint": "step 30, 20 s ago; 10 steps, 20 s, since",
        "restarts": "1",
        "work done again": "7 steps, 14 s",
        "last start": "2023-11-14T22:00:00+00:00, first step after 1 min",
    }


def test_effective_time_over_restarts(folder: Path) -> None:
    """A run of 300 s: two processes with a gap, a crash with lost steps, two saves, 40 steps."""
    table = json.loads((folder / "run.json").read_text())
    table["starts"] = [
        {"step": 0, "time": "", "lost_steps": 0, "lost_seconds": 0.0, "began": NOW - 300,
         "before_first_step_seconds": 25.0, "saving_seconds": 12.0, "ended": NOW - 220},
        # It took 7 more steps after its last save, which its successor does again.
        {"step": 30, "time": "", "lost_steps": 7, "lost_seconds": 14.0, "began": NOW - 150,
         "last_seen": NOW - 200, "before_first_step_seconds": 30.0, "saving_seconds": 6.0},
    ]  # fmt: skip
    (folder / "run.json").write_text(json.dumps(table))
    records = read_records(folder / "metrics.jsonl")
    found = effective_time(table["starts"], records, NOW)
    assert found == EffectiveTime(300, 80, 55, 18, 14, 50, 83)
    assert dict(describe(folder, NOW))["effective time"] == (
        "26.7 % trained; other 27.7 %, starts 18.3 %, between starts 16.7 %, saves 6.0 %, "
        "work done again 4.7 %"
    )
    write_status(folder, "failed", 40, "")
    # A run that has ended is not measured to the present.
    assert dict(describe(folder, NOW + 9e9))["effective time"].startswith("26.7 % trained")
    assert effective_time([{"step": 0}], records, NOW) is None
    # A process that never came to a step only started.
    alone = effective_time([{"began": NOW - 9}], [], NOW)
    assert alone == EffectiveTime(9, 0, 9, 0, 0, 0, 0)


def test_a_dead_run_is_never_called_running(folder: Path) -> None:
    """It looks at the owner's process, and on another machine at its last sign of life."""
    gone = subprocess.Popen(["true"])
    again = ". The run goes on from step 30"
    # It has ended, and nobody has asked for its exit status yet.
    while psutil.Process(gone.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    for number in (gone.pid, gone.pid):
        own(folder, process=number, started=psutil.Process().create_time())
        rows = dict(describe(folder, NOW))
        here = f"process {number} on {socket.gethostname()}"
        killed = f"died: {here} was killed, or its machine was restarted"
        assert rows["state"] == f"{killed}; last sign of life 2 s ago{again}"
        assert "time left" not in rows
        gone.wait()
    # Its number belongs to another process now.
    own(folder, started=1.0)
    assert dict(describe(folder, NOW))["state"].startswith("died: ")
    own(folder)
    assert dict(describe(folder, NOW + 7200))["state"].startswith("frozen: process ")
    own(folder, host="node7")
    assert dict(describe(folder, NOW + 60))["state"] == "running: resumed"
    lost = "died: process 1 on node7 or its machine; last sign of life 2 h 0 min ago"
    own(folder, host="node7", process=1)
    assert dict(describe(folder, NOW + 7198))["state"] == lost + again
    (folder / "lock").write_text("")
    assert dict(describe(folder, NOW))["state"].startswith("died: nothing says")


def test_the_owner_of_a_lock_shows_that_it_lives(folder: Path) -> None:
    with lock_run_folder(folder, beat=0.01):
        os.utime(folder / "lock", (0, 0))
        while not (folder / "lock").stat().st_mtime:
            time.sleep(0.01)
        assert dict(describe(folder))["state"] == "running: resumed"
    os.utime(folder / "lock", (0, 0))
    time.sleep(0.05)
    assert not (folder / "lock").stat().st_mtime


def test_status_follows_a_stop_request(folder: Path) -> None:
    (folder / "stop").touch()
    assert dict(describe(folder, NOW))["asked to stop"] == "by the file stop, still running"
    write_status(folder, "stopped", 40, "told to stop (SIGUSR1)")
    write_stopped(folder, 40, "told to stop (SIGUSR1)", folder / "checkpoints" / "step_00000040")
    rows = dict(describe(folder, NOW))
    assert rows["state"] == "stopped: told to stop (SIGUSR1)"
    assert "asked to stop" not in rows and "time left" not in rows
    write_done(folder, 100)
    assert json.loads((folder / "DONE").read_text()) == {"step": 100}


def test_status_of_an_unstarted_run_and_of_another_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: no config\.toml"):
        describe(tmp_path)
    stage = tmp_path / "extend"
    stage.mkdir()
    write_config(stage, small(f"log.folder={stage}"))
    rows = dict(describe(stage))
    assert rows["state"] == "never started" and rows["last checkpoint"] == "none yet"


def test_status_shows_stages_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("10-last", "2-long", "1-short"):
        stage = tmp_path / name
        stage.mkdir()
        write_config(stage, small(f"log.folder={stage}"))
    names = [stage.name for stage in stage_folders(tmp_path)]
    assert names == ["1-short", "2-long", "10-last"] and stage_folders(stage) == []
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("never started") == 3


def test_status_command_prints_the_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "step 40 of 100" in shown and "7 steps, 14 s" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (3900, "1 h 5 min"), (187200, "2 d 4 h")],
)
def test_duration_is_shown_in_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text

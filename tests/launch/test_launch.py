"""Runs under torchrun: killed or stopped at any moment, and resumed by the same command.

A kill in the middle of a save leaves all that a kill at another moment leaves.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from lcdist.commands.train import run
from lcdist.config import load
from lcdist.rundir.paths import latest_in
from lcdist.rundir.status import read_status
from tests.checkpoint.stored import assert_same_tensors
from tests.distributed import run_ranks

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "debug" / "full.toml"
TRAIN = ROOT / "launch" / "train.py"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# More steps than any start except the last can take before it is stopped.
STEPS, EVERY = 60, 4
SECONDS = 90.0


def words(folder: Path) -> list[str]:
    settings = ["train.seqlen=32", "model.num_layers=1", "model.hidden_size=32", "train.dtype=fp32"]
    mesh = ["parallel.cp_size=2", f"train.steps={STEPS}", f"checkpoint.every={EVERY}"]
    return [*settings, *mesh, f"log.folder={folder}", "log.peak_tflops=1", "log.tensorboard=false"]


class Start:
    """One start of a run under torchrun."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*TORCHRUN, str(TRAIN), str(CONFIG), *words(folder), *more],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; fail if the run ends first."""
        deadline = time.monotonic() + SECONDS
        while True:
            # Poll first, so that the last action of the run is not missed.
            ended = self.process.poll() is not None
            if condition():
                return
            assert not ended, self.process.communicate()[0]
            assert time.monotonic() < deadline, "the condition did not hold in time"
            time.sleep(0.01)

    def workers(self) -> list[psutil.Process]:
        """Return the processes of the ranks, in any order."""
        return [
            child
            for child in psutil.Process(self.process.pid).children()
            if str(TRAIN) in child.cmdline()
        ]

    def kill(self) -> None:
        """Kill the launcher and all ranks, as when a machine fails."""
        launcher = psutil.Process(self.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        self.process.communicate()

    def end(self) -> str:
        """Wait for the end, and return the output."""
        printed, _ = self.process.communicate(timeout=SECONDS)
        return printed


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Start]]:
    starts: list[Start] = []

    def begin() -> Start:
        starts.append(Start(tmp_path / "run"))
        return starts[-1]

    yield begin
    for started in starts:
        if started.process.poll() is None:
            started.kill()


def done(folder: Path) -> int:
    """Return the number of steps in the metrics file."""
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def never_stopped(rank: int, world_size: int, overrides: Sequence[str]) -> None:
    os.environ["WORLD_SIZE"] = str(world_size)
    run(load(CONFIG, overrides))


def assert_stopped_in_order(started: Start, name: str) -> None:
    """Assert that the run stopped on request, saved at its last step, and recorded the reason."""
    printed, status = started.end(), read_status(started.folder)
    assert status is not None, printed
    assert status["status"] == "stopped", printed
    assert name in status["reason"] or "another rank" in status["reason"]
    latest = latest_in(started.folder / "checkpoints")
    assert latest is not None and latest.name == f"step_{status['step']:08d}", printed
    assert done(started.folder) == status["step"] < STEPS
    # torchrun prints its own traceback after a signal; lcdist prints none.
    assert str(ROOT / "lcdist") not in printed, printed


@pytest.mark.exhaustive
def test_run_killed_and_stopped_ends_like_an_undisturbed_run(
    start: Callable[[], Start], tmp_path: Path
) -> None:
    folder, expected = tmp_path / "run", tmp_path / "never-stopped"
    run_ranks(never_stopped, 2, words(expected), timeout=SECONDS)

    # SIGKILL in the middle of a save; before that, another start is refused.
    saving, step = start(), random.randint(EVERY + 1, 3 * EVERY)
    saving.wait_until(lambda: done(folder) >= step)
    workers = saving.workers()
    for worker in workers:
        worker.suspend()
    refused = subprocess.run(
        [sys.executable, str(TRAIN), str(CONFIG), *words(folder), "parallel.cp_size=1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    for worker in workers:
        worker.resume()
    saving.wait_until(lambda: any((folder / "checkpoints").glob(".writing-step*/*.distcp")))
    saving.kill()
    assert refused.returncode == 2
    assert "error: " in refused.stderr and "wait for that run" in refused.stderr
    assert f"log.folder = '{folder}' is in use by process" in refused.stderr.replace("\n", " ")

    # SIGTERM to the launcher, once this start has saved for the first time.
    told = start()
    saved = latest_in(folder / "checkpoints")
    told.wait_until(lambda: latest_in(folder / "checkpoints") != saved)
    told.process.send_signal(signal.SIGTERM)
    assert_stopped_in_order(told, "SIGTERM")

    # SIGUSR1 to one rank, as a scheduler sends it before time is up.
    warned = start()
    saved = latest_in(folder / "checkpoints")
    warned.wait_until(lambda: latest_in(folder / "checkpoints") != saved)
    random.choice(warned.workers()).send_signal(signal.SIGUSR1)
    assert_stopped_in_order(warned, "SIGUSR1")
    assert warned.process.returncode == 0

    last = start()
    printed = last.end()
    assert last.process.returncode == 0, printed
    assert (read_status(folder) or {})["status"] == "finished"
    found, whole = latest_in(folder / "checkpoints"), latest_in(expected / "checkpoints")
    assert found is not None and whole is not None and found.name == whole.name
    assert_same_tensors(found, whole)
    assert losses(folder) == losses(expected)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records]

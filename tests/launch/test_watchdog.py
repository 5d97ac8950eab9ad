"""The watchdog under the real launcher: it names a frozen rank and ends the run."""

import os
import signal
from pathlib import Path

import pytest

from lcdist.rundir.status import read_status
from tests.launch.test_launch import Start, done


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(v.partition(b"=")[2]) for v in variables if v.startswith(b"RANK="))


@pytest.mark.exhaustive
def test_watchdog_names_a_frozen_rank(tmp_path: Path) -> None:
    # Rank 0 writes the status of a run, so the report must not need it.
    frozen = 0
    started = Start(tmp_path / "run", "parallel.stall=2", "train.steps=5000", "checkpoint.every=0")
    try:
        started.wait_until(lambda: done(started.folder) > 3)
        workers = {rank_of(worker.pid): worker for worker in started.workers()}
        os.kill(workers[frozen].pid, signal.SIGSTOP)
        started.wait_until(lambda: (read_status(started.folder) or {}).get("status") == "stalled")
        # Not a child of this process: only the launcher can read its exit status.
        workers[1 - frozen].wait(20)
        # The frozen rank is killed too, so the launcher does not wait for it.
        started.process.wait(20)
    finally:
        if started.process.poll() is None:
            started.kill()
    status = read_status(started.folder) or {}
    first, waiting, missing = status["reason"].splitlines()
    assert first.startswith(f"no progress in step {status['step'] + 1} for ")
    assert "(attention: full)" in first
    assert waiting.startswith(f"waiting: rank {1 - frozen} in "), waiting
    assert missing.startswith(f"missing: rank {frozen} sends no heartbeat"), missing

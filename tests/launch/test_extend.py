"""`lcdist extend` on a small scale: an interrupted job ends like an uninterrupted one."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lcdist.commands import extend, extend_steps
from lcdist.commands.main import main
from lcdist.report.sections import report_facts
from tests.launch.conftest import TINY, run_here

# A program of one rank, whose numbers are those of this process.
PROGRAM = """
import sys
from lcdist.commands import extend
from lcdist.commands.main import main
extend._ranks = lambda: 1
sys.exit(main(["extend", *sys.argv[1:]]))
"""


def words(text: Path) -> list[str]:
    return ["--data", str(text), "--name", "job", "--configs", str(TINY)]


def start(text: Path, where: Path) -> subprocess.Popen[str]:
    """Start the job in its own process group, with standard error in its standard output."""
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words(text)],
        cwd=where,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.exhaustive
def test_report_of_an_interrupted_job_equals_an_uninterrupted_one(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(whole)
        patch.setattr(extend_steps, "run_program", run_here)
        patch.setattr(extend, "_ranks", lambda: 1)
        assert main(["extend", *words(text)]) == 0
    first = capsys.readouterr().out
    assert "perplexity at 256 tokens" in first and "Worth trying next" in first
    assert (whole / "runs/job/report.html").stat().st_size > 10_000

    job = start(text, broken)
    metrics = broken / "runs/job/pretrain/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 6:
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    launcher = psutil.Process(job.pid)
    # torchrun starts its workers in sessions of their own, so a signal to the group misses them.
    for process in [launcher, *launcher.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    job.wait()
    assert not (broken / "runs/job/report.html").exists()
    again = start(text, broken)
    printed, _ = again.communicate(timeout=240)
    assert again.returncode == 0, printed
    assert report_facts(broken / "runs/job") == report_facts(whole / "runs/job")

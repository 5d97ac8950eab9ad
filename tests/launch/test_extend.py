"""`lcdist extend` on a small scale: an interrupted job ends like an uninterrupted one."""

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lcdist.report.sections import report_facts

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "launch" / "tiny"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a few hundred kilobytes of text with a pattern to learn."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    names = ["".join(words.choices("abcdefghij", k=5)) for _ in range(200)]
    for number in range(24):
        lines = [
            f"{name} = {words.choice(names)}({number})" for name in words.choices(names, k=900)
        ]
        (folder / f"part{number}.txt").write_text("\n".join(lines))
    return folder


def start(text: Path, where: Path) -> subprocess.Popen[str]:
    """Start the job in its own process group, with standard error in its standard output."""
    words = ["--data", str(text), "--name", "job", "--configs", str(TINY)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "extend.py"), *words],
        cwd=where,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(text: Path, where: Path) -> str:
    """Run the job, assert that it succeeds, and return its output."""
    job = start(text, where)
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed
    return printed


@pytest.mark.exhaustive
def test_report_of_an_interrupted_job_equals_an_uninterrupted_one(
    text: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    first = finish(text, whole)
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
    finish(text, broken)
    assert report_facts(broken / "runs/job") == report_facts(whole / "runs/job")

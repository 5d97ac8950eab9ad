"""A method of somebody else's is one file and an entry point: all shared tests take it in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).parent / "toy" / "lcdist_window.py"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of an interpreter that has the toy's distribution installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(TOY, site)
    facts = site / "lcdist_window-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: lcdist-window\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[lcdist.attention_methods]\nwindow = lcdist_window:METHOD\n"
    )
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")]),
    }


def run(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_shared_tests_pass_with_it(installed: dict[str, str]) -> None:
    shared = "tests/attention/test_methods.py"
    chosen = "window or test_on_processes_equals_reference and 2"
    said = run(installed, "-m", "pytest", "-v", "-p", "no:cacheprovider", shared, "-k", chosen)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 50 and "skipped" not in said


def test_it_is_listed_planned_and_trained(installed: dict[str, str], tmp_path: Path) -> None:
    assert "`window`" in run(installed, "-m", "lcdist", "methods")
    debug = ["configs/debug/full.toml", "attention.method=window", "attention.window=31"]
    assert "window" in run(installed, "-m", "lcdist", "plan", *debug, "--world-size", "1")
    steps = ["train.steps=2", "optim.warmup_steps=1", f"log.folder={tmp_path / 'run'}"]
    run(installed, "-m", "lcdist", "train", *debug, *steps, "log.peak_tflops=1.0")
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002\n"


def test_its_options_are_checked_as_strictly(installed: dict[str, str]) -> None:
    words = ["configs/debug/full.toml", "attention.method=window", "attention.windw=31"]
    done = subprocess.run(
        [sys.executable, "-m", "lcdist", "plan", *words],
        cwd=ROOT,
        env=installed,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "unknown key 'attention.windw'; did you mean 'attention.window'?" in done.stderr

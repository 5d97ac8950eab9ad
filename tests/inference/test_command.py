"""`lcdist generate` with a text from standard input, on one process and on two."""

import subprocess
import sys
from pathlib import Path

import pytest

from lcdist.commands.main import main
from tests.chaos.tiny_run import write_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny run that was trained on bytes."""
    folder = tmp_path_factory.mktemp("generate")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"word {number} " * 300)
    words = ["--tokenizer", "bytes", "--workers", "1", "--valid-fraction", "0.5"]
    assert main(["tokenize", str(folder), str(folder / "data"), *words]) == 0
    file = write_settings(folder / "run.toml", folder / "data", folder / "run", steps=2)
    assert main(["train", str(file)]) == 0
    return folder / "run"


def generated(start: list[str], run: Path, text: str, *words: str) -> str:
    """Return what is printed for a text on standard input, always the most likely bytes."""
    how = ["--max-new-tokens", "5", "--temperature", "0"]
    command = [*start, "-m", "lcdist", "generate", str(run), *how, *words]
    done = subprocess.run(command, cwd=ROOT, input=text, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_ranks_continue_the_text_that_rank_0_reads(run: Path) -> None:
    text = "word 1 word 2 " * 100
    one = generated([sys.executable], run, text)
    ranks = [sys.executable, "launch/run.py", "--standalone", "--nproc-per-node", "2"]
    assert generated(ranks, run, text, "parallel.tp_size=1", "parallel.cp_size=2") == one
    assert one.startswith(text) and len(one) > len(text)

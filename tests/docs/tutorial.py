"""Fenced blocks of a page of `docs/`, and programs made of them."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """One fenced block: its language, the file that its title names, and its lines."""

    language: str
    title: str
    text: str


def blocks(page: Path, language: str, titled: bool | None = None) -> list[Block]:
    """Return a page's blocks of a language in order; titled: only those with or without one."""
    found = [Block(*groups) for groups in FENCE.findall(page.read_text(encoding="utf-8"))]
    chosen = [block for block in found if block.language == language]
    return [block for block in chosen if titled is None or bool(block.title) == titled]


def joined(found: Sequence[Block]) -> str:
    """Return the lines of blocks, one after another."""
    return "\n".join(block.text for block in found)


def run_python(program: str, folder: Path, **environment: str) -> str:
    """Run a program in a folder, with this tree on its path; return what it printed."""
    return run([sys.executable, "-c", program], folder, environment)


def run(words: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    """Run a command in a folder, with this tree on its path; return its standard output."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

"""Fenced blocks of a page of `docs/`, and a user who follows the page in an empty folder."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
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


def read_blocks(page: Path) -> list[Block]:
    """Return a page's blocks in order."""
    return [Block(*groups) for groups in FENCE.findall(page.read_text(encoding="utf-8"))]


def blocks(page: Path, language: str, titled: bool | None = None) -> list[Block]:
    """Return a page's blocks of a language in order; titled: only those with or without one."""
    chosen = [block for block in read_blocks(page) if block.language == language]
    return [block for block in chosen if titled is None or bool(block.title) == titled]


@dataclass
class Reader:
    """Someone who follows a page: writes its files and runs its commands in a folder.

    Attributes:
        folder: where everything happens; empty at first.
        changes: what is written otherwise than on the page: parts of lines, and what replaces them.
        path: folders on Python's path before this tree.
        printed: what each block of commands printed, in order.
    """

    folder: Path
    changes: Mapping[str, str] = field(default_factory=dict)
    path: tuple[Path, ...] = ()
    printed: list[str] = field(default_factory=list)

    def follow(self, page: Path) -> list[str]:
        """Do what the page says, in order; return what its commands printed, by block."""
        for block in read_blocks(page):
            if block.title:
                self.write(block)
            elif block.language in ("sh", "python"):
                self.printed.append(self.run(block))
        return self.printed

    def write(self, block: Block) -> None:
        """Write the file of a block with a title."""
        file = self.folder / block.title
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self._changed(block.text), encoding="utf-8")

    def run(self, block: Block) -> str:
        """Run a block of commands or a program; return what it printed."""
        text = self._changed(block.text)
        shell = ["bash", "-euo", "pipefail", "-c", text]
        words = shell if block.language == "sh" else [sys.executable, "-c", text]
        path = os.pathsep.join(map(str, (*self.path, ROOT, ROOT / "kernels")))
        programs = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        own = {"PYTHONPATH": path, "PATH": programs, "LCDIST": str(ROOT), "COLUMNS": "100"}
        # The pages run on any machine, and their figures are those of a CPU.
        own |= {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        return done.stdout

    def _changed(self, text: str) -> str:
        for old, new in self.changes.items():
            text = text.replace(old, new)
        return text

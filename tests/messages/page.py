"""Write docs/messages.md: mistakes, and what the commands say of them.

    python -m tests.messages.page

Two kinds of numbers differ between machines and are replaced: digests, and times in log lines.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lcdist.commands.main import main
from tests.messages.cases import IN_PROCESS, PROCESSES
from tests.messages.world import make_world

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "messages.md"
INTRODUCTION = """# Messages and their remedies

Mistakes, and what lcdist says of them: what, where, its value, what is legal, and what to do. The
message is the last thing printed, and the exit status is 2. `lcdist --debug` shows the traceback.
This page is written by `python -m tests.messages.page`, and a test compares it with what the
commands print.
"""


@dataclass(frozen=True)
class Answer:
    """Hold what a command printed to standard error, and its exit status."""

    status: int
    lines: list[str]


@contextlib.contextmanager
def world() -> Iterator[Path]:
    """Work in a folder with a model, text and a run."""
    before, folder = Path.cwd(), Path(tempfile.mkdtemp())
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            make_world(folder)
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def answer_here(command: str) -> Answer:
    """Run `lcdist ...` in this process."""
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        status = main(shlex.split(command)[1:])
    return Answer(status, clean(told.getvalue()))


def answer_of_process(command: str, folder: Path) -> Answer:
    """Run a command as a process."""
    link_clone(folder)
    words = shlex.split(command.replace("PYTHON", ".venv/bin/python"))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    # make says its level in its messages.
    for name in ("LOGLEVEL", "SLURM_JOB_ID", "MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
        environment.pop(name, None)
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    return Answer(done.returncode, clean(done.stderr))


def link_clone(folder: Path) -> None:
    """Link what a clone has into a folder."""
    for name in ("launch", "slurm", "configs", "lcdist", "kernels", "Makefile", "pyproject.toml"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    if not (folder / ".venv").exists():
        (folder / ".venv").symlink_to(sys.prefix)


def clean(text: str) -> list[str]:
    """Return lines without those of a log, and without what differs between machines."""
    lines = [line for line in text.splitlines() if not re.match(r"\d\d:\d\d:\d\d |\[", line)]
    # Digests of weights differ from one kind of CPU to another.
    lines = [re.sub(r"\b[0-9a-f]{64}\b", "<digest>", line) for line in lines]
    # The page does not follow the lines of the Makefile.
    lines = [re.sub(r"\[Makefile:\d+: ", "[Makefile: ", line) for line in lines]
    return [re.sub(r"^\S+T\S+ job :", "job :", line) for line in lines if line.strip()]


def sections() -> Iterator[tuple[str, list[tuple[str, Answer]]]]:
    """Yield heading and (command, answer) of the commands that run in this process."""
    with world():
        for heading, commands in IN_PROCESS.items():
            yield heading, [(command, answer_here(command)) for command in commands]


def processes() -> list[tuple[str, Answer]]:
    """Return (command, answer) of the others."""
    with world() as folder:
        return [(command, answer_of_process(command, folder)) for command in PROCESSES]


def text_of(heading: str, answers: list[tuple[str, Answer]]) -> str:
    """Return one section of the page."""
    lines = [f"\n## {heading}\n"]
    for command, answer in answers:
        shown = command.replace("PYTHON", ".venv/bin/python")
        # What follows is torchrun's own report.
        kept = answer.lines if len(answer.lines) < 6 else [answer.lines[0], "..."]
        lines.append("\n".join(["```console", f"$ {shown}", *kept, "```\n"]))
    return "\n".join(lines)


if __name__ == "__main__":
    parts = [INTRODUCTION, *(text_of(*section) for section in sections())]
    parts.append(text_of("How it was started", processes()))
    PAGE.write_text("".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")

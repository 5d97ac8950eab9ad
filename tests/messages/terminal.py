"""Draw what a terminal shows of a run, an evaluation, a mistake and `status`: docs/terminal/*.svg.

python -m tests.messages.terminal
"""

import io
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.messages.page import ROOT, link_clone, world

FOLDER = ROOT / "docs" / "terminal"
WIDTH = 92
TRAIN = ".venv/bin/python launch/run.py --nproc-per-node 2 launch/train.py my.toml"
SCREENS = {
    "run": f"{TRAIN} parallel.cp_size=2 train.steps=80 optim.lr=5e-3 log.folder=runs/first",
    "evaluation": "lcdist evaluate runs/first evaluate.lengths=[64,256] evaluate.tokens=1500",
    "error": f"{TRAIN} parallel.cp_sise=2 train.steps=0",
    "status": "lcdist status runs/first",
}
CONTROL = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)")


def shown(raw: str) -> str:
    """Return the lines that a terminal ends with, their colours kept."""
    lines, row, is_at_start = [""], 0, False
    for part in CONTROL.split(raw):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\r":
            is_at_start = True
            continue
        elif part.endswith("A") and part.startswith("\x1b["):
            row = max(0, row - int(part[2:-1] or 1))
        elif part.startswith("\x1b[2K"):
            lines[row] = ""
        elif part and (part[-1] == "m" or not part.startswith("\x1b[")):
            # Programs that go back to the start of a line write it anew.
            lines[row] = part if is_at_start else lines[row] + part
        is_at_start = False
    return "\n".join(lines)


def output_of(command: str, folder: Path) -> str:
    """Run a command in a terminal, and return what it writes."""
    words = shlex.split(command.replace("lcdist ", ".venv/bin/python -m lcdist ", 1))
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": str(WIDTH)}
    environment |= {"TERM": "xterm-256color"}
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, cwd=folder, env=environment, stdout=theirs, stderr=theirs):
        os.close(theirs)
        read = io.BytesIO()
        try:
            while part := os.read(ours, 65536):
                read.write(part)
        except OSError:  # Linux says so when the program has ended
            pass
    os.close(ours)
    return read.getvalue().decode().replace("\r\n", "\n")


def draw(name: str, command: str, folder: Path) -> None:
    """Write the picture of a command."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    text = Text.from_ansi(shown(output_of(command, folder)))
    lines = [line for line in text.split("\n") if "socket.cpp" not in line.plain]
    console.print(Text(f"$ {command}", style="bold"))
    console.print(Text("\n").join(lines), end="")
    svg = console.export_svg(title="lcdist", unique_id=name)
    # No font from elsewhere: the reader's own.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with world() as work:
        link_clone(work)
        for screen, typed in SCREENS.items():
            draw(screen, typed, work)
    sys.exit(0)

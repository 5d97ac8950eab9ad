"""Commands import only what they need, so that the light ones start fast."""

import json
import subprocess
import sys
from pathlib import Path

from lcdist.config import load
from lcdist.rundir.run_config import write_config
from lcdist.rundir.status import write_status

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/debug/full.toml"
PROGRAM = """
import contextlib, json, sys
from lcdist.commands.main import main
for words in json.loads(sys.argv[1]):
    with contextlib.suppress(SystemExit):
        assert main(words) == 0, words
print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def packages_after(commands: list[list[str]]) -> tuple[set[str], str]:
    """Return the packages that a process has imported after some commands, and its output."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    *printed, packages = done.stdout.splitlines()
    return set(json.loads(packages)), "\n".join(printed)


def test_help_version_and_status_import_no_numerical_package(tmp_path: Path) -> None:
    write_config(tmp_path, load(ROOT / CONFIG))
    write_status(tmp_path, "stopped", 3, "by hand")
    commands = [["--help"], ["--version"], ["status", str(tmp_path)]]
    commands.append(["run-folder", "1", "2", CONFIG, "log.folder=some/where"])
    packages, printed = packages_after(commands)
    assert not packages & {"torch", "megatron", "numpy", "matplotlib", "triton", "lcdist_kernels"}
    for text in ("tokenize", "lcdist 0.", "stopped: by hand", "some/where"):
        assert text in printed


def test_plan_methods_and_report_import_no_megatron() -> None:
    commands = [["plan", CONFIG], ["methods"], ["report", "--help"]]
    packages, printed = packages_after(commands)
    assert "torch" in packages and "megatron" not in packages
    assert "parameters" in printed and "`lssar`" in printed

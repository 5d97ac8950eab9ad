"""Methods of other packages are one file and an entry point: all shared tests run on them.

`lcdist_neighbours` is the example in CONTRIBUTING.md. `lcdist_window` was released with lcdist 0.1,
before `AttentionContext`: it must load unchanged.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lcdist.attention.registry import GROUP

ROOT = Path(__file__).parents[2]
TOYS = Path(__file__).parent / "toy"
OPTIONS = {"neighbours": "reach", "window": "window"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of an interpreter that has both methods' distributions installed."""
    site = tmp_path_factory.mktemp("site")
    for name in OPTIONS:
        shutil.copy(TOYS / f"lcdist_{name}.py", site)
        info = site / f"lcdist_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: lcdist-{name}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = lcdist_{name}:METHOD\n")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")]),
    }


def run(environment: dict[str, str], *words: str, returncode: int = 0) -> str:
    """Run Python and return what it printed."""
    finished = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    printed = finished.stdout + finished.stderr
    assert finished.returncode == returncode, printed
    return printed


@pytest.mark.exhaustive
def test_shared_tests_pass(installed: dict[str, str]) -> None:
    shared = ["tests/attention/test_methods.py", "tests/attention/test_cache.py"]
    chosen = "window or neighbours or test_processes_equal_reference and 2"
    words = ["-vv", "-p", "no:cacheprovider", "-m", "not exhaustive", "-k", chosen, *shared]
    printed = run(installed, "-m", "pytest", *words)
    passed = re.findall(r"::(test_\w+)\S* PASSED", printed)
    assert "skipped" not in printed and "test_processes_equal_reference" in passed
    assert "test_calls_of_any_size_equal_the_reference" in passed
    for name in OPTIONS:
        assert len(re.findall(rf"\[.*{name}.*\] PASSED", printed)) > 15, printed


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["neighbours", "window"])
def test_method_is_listed_planned_and_trained(
    installed: dict[str, str], tmp_path: Path, name: str
) -> None:
    debug = [
        "configs/debug/full.toml",
        f"attention.method={name}",
        f"attention.{OPTIONS[name]}=31",
    ]
    steps = ["train.steps=2", "optim.warmup_steps=1", f"log.folder={tmp_path / 'run'}"]
    commands = [
        ["methods"],
        ["plan", *debug, "--world-size", "1"],
        ["train", *debug, *steps, "log.peak_tflops=1.0"],
    ]
    # One process, because a start takes seconds.
    program = "import sys\nfrom lcdist.commands.main import main\n"
    program += "\n".join(f"print('--', main({words!r}))" for words in commands)
    listed, planned, _, _ = run(installed, "-c", program).split("-- 0\n")
    assert f"`{name}`" in listed and name in planned
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_00000002\n"


def test_options_are_checked_strictly(installed: dict[str, str]) -> None:
    words = ["configs/debug/full.toml", "attention.method=window", "attention.windw=31"]
    printed = run(installed, "-m", "lcdist", "plan", *words, returncode=2)
    assert "unknown key 'attention.windw'; did you mean 'attention.window'?" in printed


def test_example_in_contributing_is_the_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert example == (TOYS / "lcdist_neighbours.py").read_text()
    (table,) = re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert tomllib.loads(table)["project"]["entry-points"] == {
        GROUP: {"neighbours": "lcdist_neighbours:METHOD"}
    }

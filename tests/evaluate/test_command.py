"""`lcdist evaluate` as it is typed: its files, its table, and what is refused."""

import json
import re
from pathlib import Path

import pytest

from lcdist.commands.main import main
from lcdist.distributed.mesh import end_world, start_world
from tests.evaluate.worlds import trained_model, with_data

ASKED = ("evaluate.lengths=[24, 96]", "evaluate.tokens=192")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder with a checkpoint."""
    folder = with_data(tmp_path_factory.mktemp("command"))
    start_world(60)
    trained_model(folder)
    end_world()
    return folder


def test_the_same_command_goes_on_and_results_have_their_first_keys(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    words = ["evaluate", str(run), "--output", str(output), *ASKED]
    assert main(words) == 0
    printed, result = capsys.readouterr().out, json.loads(output.read_text())
    # The keys that readers of these files have known from the beginning.
    first = {"checkpoint", "step", "lengths", "perplexity", "scored", "tokens", "attention"}
    assert {*first, "joined", "measured"} <= result.keys()
    rows = re.findall(r"│ (\d+) +│ ([\d.]+) +│ ([\d,]+) +│", printed)
    assert rows == [
        (str(length), f"{value:.3f}", f"{scored}")
        for length, value, scored in zip(
            result["lengths"], result["perplexity"], result["scored"], strict=True
        )
    ]
    for low, high in result["measured"]["perplexity"]["interval"]:
        assert 0 < low < high
    units = tmp_path / "result.json.units.jsonl"
    before = units.stat().st_mtime_ns
    content = output.read_bytes()
    output.unlink()
    assert main(words) == 0
    assert output.read_bytes() == content and units.stat().st_mtime_ns == before


def test_two_checkpoints_keep_their_units_apart(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "both.json"
    page = tmp_path / "both.html"
    words = ["evaluate", str(run), "--before", str(run), "--output", str(output)]
    assert main([*words, "--html", str(page), *ASKED]) == 0
    result = json.loads(output.read_text())
    assert "Perplexity by length" in page.read_text()
    page.unlink()
    assert result["before"] == result["after"]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["both.json", "both.json.after.units.jsonl", "both.json.before.units.jsonl"]


def test_what_cannot_be_is_refused_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*words: str) -> str:
        assert main(["evaluate", str(run), *words]) == 2
        end_world()
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert error_of("--overwrite") == (
        "error: --overwrite has no meaning without --output; leave it out"
    )
    assert error_of("evaluate.measure=[passkey]", "evaluate.device_blocks=4") == (
        "error: evaluate.device_blocks = 4: only landmark attention with attention.top_k reads "
        "chosen blocks; set it to 0, or give attention.top_k=NUMBER"
    )
    output = tmp_path / "x.json"
    assert main(["evaluate", str(run), "--output", str(output), *ASKED]) == 0
    capsys.readouterr()
    line = error_of("--output", str(output), *ASKED, "evaluate.seed=3")
    assert line == (
        f"error: {output}.units.jsonl has what another evaluation measured (evaluate.seed was 0, "
        "is 3): delete it, or add --overwrite to measure everything again"
    )
    assert main(["evaluate", str(run), "--output", str(output), *ASKED, "--overwrite"]) == 0

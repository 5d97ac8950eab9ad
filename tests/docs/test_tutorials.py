"""The tutorials do what they say: code is quoted as it is, pictures and programs are made again."""

import json
import re
import shlex
from pathlib import Path

import pytest

from docs.tutorials.tiles import draw_all
from lcdist.commands.main import parse_words
from lcdist.config import load
from lcdist.plan import make_plan
from tests.docs.tutorial import ROOT, TUTORIALS, Block, Reader, blocks

KERNEL, METHOD = TUTORIALS / "read_a_kernel.md", TUTORIALS / "add_a_method.md"
LLAMA = TUTORIALS / "extend_a_llama.md"


def test_code_quoted_from_a_kernel_is_the_kernels() -> None:
    quoted = blocks(KERNEL, "python", titled=True)
    assert len(quoted) > 8
    for block in quoted:
        source = (ROOT / block.title).read_text(encoding="utf-8")
        assert f"\n{block.text}" in source, f"{block.title} has no such lines:\n{block.text}"


def test_pictures_of_tiles_are_those_that_the_kernels_tables_give() -> None:
    committed = {path.name: path.read_text() for path in (TUTORIALS / "tiles").glob("*.svg")}
    assert draw_all() == committed, "run python docs/tutorials/tiles.py"
    page = KERNEL.read_text(encoding="utf-8")
    assert all(f"(tiles/{name})" in page for name in committed)


def test_experiments_with_the_kernel_print_what_the_page_shows(tmp_path: Path) -> None:
    program = "\n".join(block.text for block in blocks(KERNEL, "python", titled=False))
    shown = "".join(block.text for block in blocks(KERNEL, "text"))
    assert Reader(tmp_path).run(Block("python", "", program)) == shown


def test_the_packages_own_tests_pass(tmp_path: Path) -> None:
    reader = Reader(tmp_path, path=(tmp_path / "lcdist-sinks",))
    for block in blocks(METHOD, "python", titled=True):
        reader.write(block)
    printed = reader.run(Block("sh", "", "pytest -q lcdist-sinks/tests"))
    assert "3 passed" in printed


@pytest.mark.exhaustive
def test_the_method_of_the_page_passes_all_tests_trains_and_generates(tmp_path: Path) -> None:
    site = tmp_path / "site"
    # The package goes to a folder of its own instead of the environment, without the network.
    alone = f"--no-deps --no-build-isolation --no-index --target '{site}'"
    installs = {
        "pip install -e": f"python -m pip install -q {alone}",
    }
    folder = tmp_path / "user"
    folder.mkdir()
    # The source comes first, as with `-e`, so that later changes take effect.
    reader = Reader(folder, installs, (folder / "lcdist-sinks", site))
    listed, own, shared, trained, own_again, *_ = reader.follow(METHOD)
    assert "| `sink_window` |" in listed
    for printed in (own, shared):
        assert " passed" in printed and "failed" not in printed and "skipped" not in printed
    assert "8,960 B forward, 8,960 B backward" in trained and "\ndef " in trained
    assert " passed" in own_again

    def losses(name: str) -> list[float]:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    assert losses("again") == pytest.approx(losses("run"), rel=1e-5)
    assert losses("run")[-1] < losses("run")[0] - 1


@pytest.mark.parametrize("page", [LLAMA, METHOD], ids=lambda page: page.stem)
def test_commands_can_be_given_and_configurations_planned(page: Path, tmp_path: Path) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.text.splitlines()]
    ours = [shlex.split(line)[1:] for line in lines if line.startswith("lcdist ")]
    assert len(ours) > 3
    for words in ours:
        parse_words(words[: words.index(">")] if ">" in words else words)
    for block in blocks(page, "toml"):
        if "[model]" in block.text and '"sink_window"' not in block.text:
            (tmp_path / block.title).write_text(block.text)
            make_plan(load(tmp_path / block.title), 1)


def shown_perplexities() -> dict[int, list[float]]:
    """Return what the page shows by length: before, and where there is one after."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \|(?: (\d+) \|)?$", LLAMA.read_text(), re.MULTILINE)
    return {int(length): [float(x) for x in found if x] for length, *found in rows}


@pytest.mark.exhaustive
def test_the_llama_of_the_page_reads_longer_text_after_every_step(tmp_path: Path) -> None:
    printed = Reader(tmp_path).follow(LLAMA)
    assert blocks(LLAMA, "text")[-1].text in printed[-1]
    assert "convert import" not in (tmp_path / "long.toml").read_text()
    before = json.loads((tmp_path / "before.json").read_text())
    both = json.loads((tmp_path / "after.json").read_text())
    found = {length: [x] for length, x in zip(before["lengths"], before["perplexity"], strict=True)}
    assert both["before"]["perplexity"] == pytest.approx(before["perplexity"][1:], rel=1e-5)
    for length, x in zip(both["after"]["lengths"], both["after"]["perplexity"], strict=True):
        found[length].append(x)
    shown = shown_perplexities()
    assert shown.keys() == found.keys()
    for length, values in shown.items():
        assert found[length] == pytest.approx(values, rel=0.05)
    assert found[512][1] < 0.6 * found[512][0] and found[512][1] < found[256][1]
    assert all(each["measured"]["passkey"]["accuracy"] == [0, 0] for each in both.values())
    for page in ("after.html", "runs/long/report.html"):
        assert (tmp_path / page).stat().st_size > 10_000

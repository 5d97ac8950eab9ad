"""The Python examples of the README and of the API pages run as they stand there."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lcdist.commands.main import main
from lcdist.distributed.mesh import end_world
from tests.chaos.tiny_run import write_settings
from tests.docs.tutorial import ROOT, Block, blocks

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs" / "api").glob("*.md")))
EXAMPLES = [(page, block) for page in PAGES for block in blocks(page, "python")]
# Held-out text of the README's longest length.
DOCUMENTS, WORDS = 8, 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `runs/first`, a tiny model that was trained on bytes, and `configs`."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text").mkdir()
    for number in range(DOCUMENTS):
        (folder / "text" / f"{number}.txt").write_text(f"word {number} " * WORDS)
    words = ["--tokenizer", "bytes", "--workers", "1", "--valid-fraction", "0.5"]
    assert main(["tokenize", str(folder / "text"), str(folder / "data"), *words]) == 0
    file = write_settings(folder / "run.toml", folder / "data", folder / "runs" / "first", steps=2)
    assert main(["train", str(file)]) == 0
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


@pytest.fixture(autouse=True)
def no_world() -> Iterator[None]:
    yield
    end_world()


@pytest.mark.parametrize(
    ("page", "block"), EXAMPLES, ids=[page.name.removesuffix(".md") for page, _ in EXAMPLES]
)
def test_an_example_runs(
    page: Path,
    block: Block,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    exec(compile(block.text, str(page), "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    assert bool(printed) == ("print(" in block.text)
    if "generate_text" in block.text:
        assert "class Reader:" in printed


def test_every_page_that_is_programmed_against_has_an_example() -> None:
    assert {page for page, _ in EXAMPLES} == set(PAGES)
    [readme] = blocks(PAGES[0], "python")
    assert len(readme.text.splitlines()) <= 10

"""The tutorials do what they say: code is quoted as it is, pictures and programs are made again."""

from pathlib import Path

from docs.tutorials.tiles import draw_all
from tests.docs.tutorial import ROOT, TUTORIALS, blocks, joined, run_python

KERNEL = TUTORIALS / "read_a_kernel.md"


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
    program = joined(blocks(KERNEL, "python", titled=False))
    shown = "".join(block.text for block in blocks(KERNEL, "text"))
    assert run_python(program, tmp_path) == shown

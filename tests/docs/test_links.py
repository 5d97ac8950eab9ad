"""Links of pages: what is found in Markdown, and where links lead in the site."""

import json
from pathlib import Path

import pytest

from docs.generate.blocks import fill
from docs.generate.links import link_targets
from docs.generate.repository import (
    BrokenLinkError,
    linked_files,
    origin_of,
    page_text,
    site_links,
    site_uri,
)

PAGE = "docs/guide/page.md"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    files = {
        PAGE: "",
        "docs/other.md": "",
        "docs/generate/hook.py": "",
        "lcdist/code.py": "x = '```'\n",
        "kernels/bench/README.md": "[rows](rows.csv)",
        "kernels/bench/rows.csv": "a,b\n",
        "kernels/bench/full.png": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_links_in_code_and_comments_are_not_found() -> None:
    text = "[a](b.md) `[c](d.md)` <!-- [e](f.md) -->\n```sh\n[g](h.md)\n```\n"
    text += '![i](j.png "k")[l](m)'
    assert list(link_targets(text)) == ["b.md", "j.png", "m"]


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("../other.md#part", "../other.md#part"),
        ("../../lcdist/code.py", "../source/lcdist/code.py.md"),
        ("../generate/hook.py", "../source/docs/generate/hook.py.md"),
        ("../../kernels/bench", "../source/kernels/bench/README.md"),
        ("../../kernels/bench/full.png", "../source/kernels/bench/full.png"),
        ("../../lcdist", "../source/lcdist/index.md"),
        ("https://arxiv.org/abs/1706.03762", "https://arxiv.org/abs/1706.03762"),
        ("#part", "#part"),
    ],
)
def test_a_link_leads_to_the_page_of_its_file(root: Path, link: str, expected: str) -> None:
    assert site_links(f"see [it]({link})", PAGE, root) == f"see [it]({expected})"


@pytest.mark.parametrize("link", ["none.md", "../../none", "../../../outside.md"])
def test_a_link_to_nothing_is_refused(root: Path, link: str) -> None:
    (root.parent / "outside.md").write_text("")
    with pytest.raises(BrokenLinkError, match=r"docs/guide/page.md: the link"):
        site_links(f"[it]({link})", PAGE, root)


def test_pages_of_linked_files_follow_their_own_links(root: Path) -> None:
    pages = linked_files({PAGE: "[b](../../kernels/bench) [c](../../lcdist/code.py)"}, root)
    assert [page.origin for page in pages] == [
        "kernels/bench/README.md",
        "kernels/bench/rows.csv",
        "lcdist/code.py",
    ]
    assert all(page.uri == site_uri(page.origin) for page in pages)
    assert all(origin_of(page.uri, root) == page.origin for page in pages)
    shown = page_text(pages[-1], root)
    assert "x = '```'\n" in shown and shown.count("~" * 12) == 2


def test_a_folder_without_a_readme_is_a_list_of_links(root: Path) -> None:
    (root / "lcdist" / "attention").mkdir()
    pages = linked_files({PAGE: "[all](../../lcdist)"}, root)
    assert [page.origin for page in pages] == ["lcdist/", "lcdist/code.py"]
    listed = page_text(pages[0], root)
    assert "- `attention/`\n- [code.py](code.py)\n" in listed
    assert origin_of(pages[0].uri, root) == "lcdist/"
    assert "(code.py.md)" in site_links(listed, "lcdist/", root)


def test_a_notebook_is_shown_with_its_outputs(root: Path) -> None:
    outputs = [
        {"output_type": "stream", "text": ["one\n", "two\n"]},
        {"output_type": "display_data", "data": {"image/png": "QUJD\n", "text/plain": "<Figure>"}},
        {"output_type": "execute_result", "data": {"text/plain": "3"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "[code](../lcdist/code.py)"]},
        {"cell_type": "code", "source": "print()", "outputs": outputs},
    ]
    (root / "docs" / "note.ipynb").write_text(json.dumps({"cells": cells}))
    pages = linked_files({PAGE: "[note](../note.ipynb)"}, root)
    assert [page.origin for page in pages] == ["docs/note.ipynb", "lcdist/code.py"]
    shown = page_text(pages[0], root)
    assert shown.startswith("# Title\n") and "one\ntwo\n~~~" in shown and "\n3\n~~~" in shown
    assert "(data:image/png;base64,QUJD)" in shown and "Figure" not in shown
    assert origin_of(pages[0].uri, root) == "docs/note.ipynb"
    assert "(../lcdist/code.py.md)" in site_links(shown, "docs/note.ipynb", root)


def test_a_block_that_nothing_makes_is_refused() -> None:
    assert fill("a\n<!-- make: it -->\n", PAGE, {"it": lambda: "| b |"}) == "a\n| b |\n"
    with pytest.raises(ValueError, match="nothing makes 'that'; there are it"):
        fill("<!-- make: that -->", PAGE, {"it": str})

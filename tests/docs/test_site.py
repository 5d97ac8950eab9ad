"""The site builds without a warning, its links lead somewhere, and it loads nothing else."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from docs.generate.links import is_external

ROOT = Path(__file__).parents[2]
# Packages that are programmed against.
ROOMS = ("config", "convert", "evaluate", "exchange", "inference", "layout", "plan")
# Attributes with an address that a browser loads by itself.
LOADED = {"src", "srcset", "poster", "data"}


@dataclass
class Html(HTMLParser):
    """A page: its anchors, and what it links to or loads."""

    file: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name == "href" and value is not None:
                (self.loads if tag == "link" else self.links).append(value)
            elif name in LOADED and value:
                self.loads.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; a warning is an error."""
    commands = pytest.importorskip("mkdocs.commands.build", reason="pip install 'lcdist[docs]'")
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    commands.build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out)))
    return out


def pages(site: Path) -> Iterator[Path]:
    # MkDocs gives the page of an unknown address links from the root of a server.
    yield from (path for path in sorted(site.rglob("*.html")) if path.name != "404.html")


@cache
def parsed(file: Path) -> Html:
    return Html(file)


def broken(page: Html, link: str) -> str | None:
    """Return what is wrong with a link, or None."""
    if link.startswith("data:image/"):
        return None
    if is_external(link) and not link.startswith("#"):
        found = urlsplit(link)
        wrong = found.scheme != "https" or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", found.netloc)
        return "not an address" if wrong else None
    path, _, anchor = link.partition("#")
    file = page.file if not path else (page.file.parent / unquote(path)).resolve()
    if not file.is_file():
        return "no file"
    if anchor and file.suffix == ".html" and unquote(anchor) not in parsed(file).anchors:
        return "no anchor"
    return None


@pytest.mark.exhaustive
def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    wrong = [
        f"{file.relative_to(site)}: {link}: {why}"
        for file in pages(site)
        for link in [*parsed(file).links, *parsed(file).loads]
        if (why := broken(parsed(file), link))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.exhaustive
def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    wrong = [
        f"{file.relative_to(site)}: {address}"
        for file in site.rglob("*.html")
        for address in parsed(file).loads
        if is_external(address) and not address.startswith("data:") or address.startswith("//")
    ]
    styles = [*site.rglob("*.css")]
    wrong += [
        f"{file.relative_to(site)}: {address}"
        for file in styles
        for address in re.findall(
            r"url\(\s*['\"]?((?:https?:)?//[^)]*)|@import[^;]*//", file.read_text(encoding="utf-8")
        )
    ]
    assert styles and not wrong, "\n".join(wrong)


@pytest.mark.exhaustive
def test_every_page_that_a_person_wrote_is_in_the_site(site: Path) -> None:
    written = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    missing = [str(path) for path in written if not (site / path.with_suffix(".html")).is_file()]
    assert written and not missing


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["lcdist_kernels", *(f"lcdist.{room}" for room in ROOMS)])
def test_every_public_name_is_in_the_reference(site: Path, name: str) -> None:
    package = import_module(name)
    public = {each for each in package.__all__ if not each.isupper()}
    anchors = {a for file in (site / "api").glob("*.html") for a in parsed(file).anchors}
    shown = {anchor.rpartition(".")[2] for anchor in anchors if anchor.startswith(f"{name}.")}
    assert public and public <= shown


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="one"></h1><a href="b.html#two">x</a>')
    (tmp_path / "b.html").write_text('<h1 id="two"></h1>')
    page = Html(tmp_path / "a.html")
    assert broken(page, "b.html#two") is None and broken(page, "#one") is None
    assert broken(page, "b.html#three") == "no anchor" and broken(page, "c.html") == "no file"
    assert broken(page, "https://example.org/x") is None
    assert broken(page, "http:/example") == "not an address"

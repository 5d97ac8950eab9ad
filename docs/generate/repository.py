"""Make pages of the site from files of the repository that its pages link to."""

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from docs.generate.links import is_external, link_targets, replace_targets

ROOT = Path(__file__).parents[2]
DOCS = "docs"
# Where pages of files outside docs/ stand in the site.
FOLDER = "source"
PICTURES = {".png", ".svg"}
# Files in docs/ that are programs and not pages.
PROGRAMS = {".py", ".ipynb"}
LANGUAGES = {
    **{".py": "python", ".toml": "toml", ".sh": "bash", ".json": "json", ".html": "html"},
    **{".yml": "yaml", ".ipynb": "json"},
}


class BrokenLinkError(ValueError):
    """A link of a page leads to no file of the repository."""


@dataclass(frozen=True)
class SourcePage:
    """A page, or a picture, of the site that shows a file outside docs/.

    Attributes:
        origin: The file, from the root of the repository.
        uri: Its place in the site, as MkDocs names sources of pages.
    """

    origin: str
    uri: str

    @property
    def is_picture(self) -> bool:
        """Whether the file is copied as it is."""
        return PurePosixPath(self.origin).suffix in PICTURES

    @property
    def is_markdown(self) -> bool:
        """Whether the page is the file's own text."""
        return self.origin.endswith(".md")


def site_uri(origin: str) -> str:
    """Return where the site shows a file of the repository."""
    path = PurePosixPath(origin)
    if path.parts[0] == DOCS and path.suffix not in PROGRAMS:
        return str(path.relative_to(DOCS))
    return f"{FOLDER}/{path}" if path.suffix in {".md", *PICTURES} else f"{FOLDER}/{path}.md"


def target_of(origin: str, link: str, root: Path = ROOT) -> str:
    """Return the file, from the root, that a link in the file `origin` leads to.

    Raises:
        BrokenLinkError: There is no such file, it is outside the repository, or it is a folder
            without a README.md.
    """
    found = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link.split("#")[0]))
    if (root / found).is_dir():
        found = posixpath.normpath(posixpath.join(found, "README.md"))
    if found.startswith("..") or not (root / found).is_file():
        raise BrokenLinkError(f"{origin}: the link {link!r} leads to no file")
    return found


def site_links(markdown: str, origin: str, root: Path = ROOT) -> str:
    """Return the text of the file `origin` with links that work in the site."""

    def change(link: str) -> str:
        if is_external(link):
            return link
        uri = site_uri(target_of(origin, link, root))
        _, mark, anchor = link.partition("#")
        relative = posixpath.relpath(uri, posixpath.dirname(site_uri(origin)) or ".")
        return f"{relative}{mark}{anchor}"

    return replace_targets(markdown, change)


def linked_files(pages: Mapping[str, str], root: Path = ROOT) -> list[SourcePage]:
    """Return a page for each file outside docs/ that pages link to, directly or by each other.

    Args:
        pages: The text of each page, by its file from the root.
        root: The root of the repository.
    """
    found: dict[str, SourcePage] = {}
    waiting = dict(pages)
    while waiting:
        origin, markdown = waiting.popitem()
        for target in _targets(markdown, origin, root):
            page = SourcePage(target, site_uri(target))
            if not page.uri.startswith(f"{FOLDER}/") or target in found:
                continue
            found[target] = page
            if page.is_markdown:
                waiting[target] = (root / target).read_text(encoding="utf-8")
    return [found[name] for name in sorted(found)]


def _targets(markdown: str, origin: str, root: Path) -> Iterable[str]:
    links = (link for link in link_targets(markdown) if not is_external(link))
    return [target_of(origin, link, root) for link in links]


def page_text(page: SourcePage, root: Path = ROOT) -> str:
    """Return the Markdown of a page: the file's own text, or its code with line numbers."""
    text = (root / page.origin).read_text(encoding="utf-8")
    if page.is_markdown:
        return text
    # Search is for the pages that people wrote.
    header = "---\nsearch:\n  exclude: true\n---\n\n"
    language = LANGUAGES.get(PurePosixPath(page.origin).suffix, "text")
    fence = "~" * 12
    title = PurePosixPath(page.origin).name
    return (
        f"{header}# {title}\n\n`{page.origin}`\n\n"
        f'{fence} {{ .{language} linenums="1" }}\n{text}\n{fence}\n'
    )

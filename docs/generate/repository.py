"""Make pages of the site from files of the repository that its pages link to."""

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from docs.generate.links import is_external, link_targets, replace_targets
from docs.generate.notebook import notebook_page

ROOT = Path(__file__).parents[2]
DOCS = "docs"
# Where pages of files outside docs/ stand in the site.
FOLDER = "source"
PICTURES = {".png", ".svg"}
# The page of a folder without README.md.
LIST = "index.md"
# Files in docs/ that are programs and not pages.
PROGRAMS = {".py", ".ipynb"}
LANGUAGES = {
    **{".py": "python", ".toml": "toml", ".sh": "bash", ".json": "json", ".html": "html"},
    ".yml": "yaml",
}


class BrokenLinkError(ValueError):
    """A link of a page leads to no file of the repository."""


@dataclass(frozen=True)
class SourcePage:
    """A page, or a picture, of the site that shows a file outside docs/.

    Attributes:
        origin: The file, from the root of the repository, or a folder without README.md.
        uri: Its place in the site, as MkDocs names sources of pages.
    """

    origin: str
    uri: str

    @property
    def is_picture(self) -> bool:
        """Return whether the file is copied without a change."""
        return PurePosixPath(self.origin).suffix in PICTURES

    @property
    def is_markdown(self) -> bool:
        """Return whether the page can have links: Markdown, notebooks and lists can."""
        return self.uri.endswith(f"/{LIST}") or self.origin.endswith((".md", ".ipynb"))


def site_uri(origin: str) -> str:
    """Return where the site shows a file of the repository; a folder ends in `/`."""
    path = PurePosixPath(origin)
    if origin.endswith("/"):
        return f"{FOLDER}/{path}/{LIST}"
    if path.parts[0] == DOCS and path.suffix not in PROGRAMS:
        return str(path.relative_to(DOCS))
    return f"{FOLDER}/{path}" if path.suffix in {".md", *PICTURES} else f"{FOLDER}/{path}.md"


def origin_of(uri: str, root: Path = ROOT) -> str:
    """Return the file that a page of the site shows, from the root: the inverse of `site_uri`."""
    if not uri.startswith(f"{FOLDER}/"):
        return f"{DOCS}/{uri}"
    origin = uri.removeprefix(f"{FOLDER}/")
    if (root / origin).is_file():
        return origin
    shown = origin.removesuffix(".md")
    return shown if (root / shown).is_file() else origin.removesuffix(LIST)


def target_of(origin: str, link: str, root: Path = ROOT) -> str:
    """Return the file, from the root, that a link in the file `origin` leads to.

    A folder stands for its README.md; without one it ends in `/`.

    Raises:
        BrokenLinkError: There is no such file, or it is outside the repository.
    """
    found = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link.split("#")[0]))
    if found.startswith("..") or not (root / found).exists():
        raise BrokenLinkError(f"{origin}: the link {link!r} leads to no file")
    if (root / found).is_dir():
        readme = posixpath.join(found, "README.md")
        return readme if (root / readme).is_file() else f"{found}/"
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
                waiting[target] = page_text(page, root)
    return [found[name] for name in sorted(found)]


def _targets(markdown: str, origin: str, root: Path) -> Iterable[str]:
    links = (link for link in link_targets(markdown) if not is_external(link))
    return [target_of(origin, link, root) for link in links]


def page_text(page: SourcePage, root: Path = ROOT) -> str:
    """Return the Markdown of a page: the file's own text, or its code with line numbers."""
    if page.origin.endswith("/"):
        return _list_of(page.origin, root)
    text = (root / page.origin).read_text(encoding="utf-8")
    # Search is for the pages that people wrote.
    header = "---\nsearch:\n  exclude: true\n---\n\n"
    if page.origin.endswith(".md"):
        return text
    if page.origin.endswith(".ipynb"):
        return notebook_page(text)
    language = LANGUAGES.get(PurePosixPath(page.origin).suffix, "text")
    fence = "~" * 12
    title = PurePosixPath(page.origin).name
    return (
        f"{header}# {title}\n\n`{page.origin}`\n\n"
        f'{fence} {{ .{language} linenums="1" }}\n{text}\n{fence}\n'
    )


def _list_of(folder: str, root: Path) -> str:
    """Return a page with the files of a folder, as links, and the names of its folders."""
    lines = [f"# {PurePosixPath(folder).name}", "", f"`{folder}`", ""]
    for path in sorted((root / folder).iterdir(), key=lambda path: (path.is_file(), path.name)):
        if path.name.startswith((".", "__pycache__")):
            continue
        lines.append(f"- [{path.name}]({path.name})" if path.is_file() else f"- `{path.name}/`")
    return "\n".join(lines) + "\n"

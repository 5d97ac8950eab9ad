"""Events of MkDocs: add pages of linked files, fill blocks of pages, and make links work."""

from collections.abc import Mapping
from typing import Any

import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from docs.generate.blocks import fill
from docs.generate.repository import (
    DOCS,
    FOLDER,
    ROOT,
    linked_files,
    origin_of,
    page_text,
    site_links,
    site_uri,
)

# On a busy machine, more threads only wait for each other.
torch.set_num_threads(1)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the tutorials and notebooks that there are in the navigation."""
    docs = ROOT / DOCS
    found = [str(path.relative_to(docs)) for path in sorted(docs.glob("tutorials/*.md"))]
    found += [site_uri(f"{DOCS}/{path.name}") for path in sorted(docs.glob("*.ipynb"))]
    for entry in config.nav or ():
        if "Tutorials" in entry:
            entry["Tutorials"] = found
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file outside docs/ that a page links to."""
    pages = {
        f"{DOCS}/{file.src_uri}": fill(file.content_string, f"{DOCS}/{file.src_uri}")
        for file in files.documentation_pages()
    }
    for page in linked_files(pages | {DOCS + "/nav": navigated(config.nav)}):
        if page.is_picture:
            added = File.generated(config, page.uri, abs_src_path=str(ROOT / page.origin))
        else:
            text = page_text(page)
            added = File.generated(
                config, page.uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV
            )
        files.append(added)
    return files


def navigated(nav: Any) -> str:
    """Return links, from docs/, to the files outside it that the navigation names."""
    if isinstance(nav, str):
        origin = origin_of(nav)
        return f"[{origin}](../{origin})\n" if nav.startswith(f"{FOLDER}/") else ""
    entries = nav.values() if isinstance(nav, Mapping) else nav or ()
    return "".join(map(navigated, entries))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the blocks of a page and replace its links by those of the site."""
    origin = origin_of(page.file.src_uri)
    is_page_of_docs = not page.file.src_uri.startswith(f"{FOLDER}/")
    return site_links(fill(markdown, origin) if is_page_of_docs else markdown, origin)

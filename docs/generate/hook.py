"""Events of MkDocs: add pages of linked files, fill blocks of pages, and make links work."""

from collections.abc import Mapping
from typing import Any

import torch
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from docs.generate.blocks import fill
from docs.generate.repository import DOCS, FOLDER, ROOT, linked_files, page_text, site_links

# On a busy machine, more threads only wait for each other.
torch.set_num_threads(1)


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
        origin = nav.removeprefix(f"{FOLDER}/")
        return "" if origin == nav else f"[{origin}](../{origin})\n"
    entries = nav.values() if isinstance(nav, Mapping) else nav or ()
    return "".join(map(navigated, entries))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the blocks of a page and replace its links by those of the site."""
    uri = page.file.src_uri
    if uri.startswith(f"{FOLDER}/"):
        origin = uri.removeprefix(f"{FOLDER}/")
        return site_links(markdown, origin)
    origin = f"{DOCS}/{uri}"
    return site_links(fill(markdown, origin), origin)

"""Show a notebook, with the outputs that it was committed with, as a page."""

import base64
import json
from collections.abc import Iterator
from typing import Any

FENCE = "~" * 12
# Kinds of an output, the one to show first.
PICTURES = ("image/svg+xml", "image/png")


def notebook_page(text: str) -> str:
    """Return a notebook's cells and outputs as Markdown."""
    return "\n\n".join(part for cell in json.loads(text)["cells"] for part in _cell(cell)) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    source = _joined(cell["source"])
    if cell["cell_type"] != "code":
        yield source
        return
    yield _fenced("python", source)
    for output in cell["outputs"]:
        yield from _output(output)


def _output(output: dict[str, Any]) -> Iterator[str]:
    """Yield what an output shows: a picture where it has one, else its text."""
    found = output.get("data", {})
    for kind in PICTURES:
        if kind in found:
            content = _joined(found[kind])
            if kind != "image/png":
                content = base64.b64encode(content.encode()).decode()
            yield f"![output](data:{kind};base64,{''.join(content.split())})"
            return
    text = _joined(output.get("text") or found.get("text/plain") or "")
    if text.strip():
        yield _fenced("text", text)


def _fenced(language: str, text: str) -> str:
    return f"{FENCE} {language}\n{text.rstrip()}\n{FENCE}"


def _joined(text: str | list[str]) -> str:
    """Return text that a notebook keeps as one string or as lines."""
    return text if isinstance(text, str) else "".join(text)

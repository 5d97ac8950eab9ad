"""Count how much of a text is in documents of at least some length.

A context is taught by the documents that fill it. Shorter ones, joined, teach a model that what
stands far back does not matter.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lcdist.data.meta import META, REMAKE, Meta
from lcdist.data.prepare.indexed import document_lengths
from lcdist.utils.json_file import check_types

# The shortest context that is counted; the next is twice as long, and so on.
SHORTEST = 512


def retention(lengths: np.ndarray) -> dict[str, Any]:
    """Return the longest document, and what stands in documents of at least 512, 1024, ... tokens.

    Args:
        lengths: of all documents, in tokens.

    Returns:
        longest: tokens of the longest document.
        at_least: a list of [context, documents, tokens], up to the longest context with one.
    """
    longest = int(lengths.max(initial=0))
    rows, context = [], SHORTEST
    # What a context needs is needed for a longer one too: each step looks at what is left.
    left = lengths[lengths >= context]
    while len(left):
        rows.append([context, len(left), int(left.sum(dtype=np.int64))])
        context *= 2
        left = left[left >= context]
    return {"longest": longest, "at_least": rows}


def retention_of(folder: Path, meta: Meta) -> dict[str, Any]:
    """Return the retention of a folder's first split, train, which older folders do not record.

    Raises:
        ValueError: what is recorded is not as `retention` returns it.
    """
    split = next(iter(meta.tokens))
    if meta.lengths is None:
        return retention(document_lengths(folder / split))
    hints = {"longest": int, "at_least": list[list[int]]}
    where = f"{folder / META}: lengths"
    check_types(meta.lengths, {split: dict}, where, REMAKE)
    check_types(meta.lengths[split], hints, f"{where}.{split}", REMAKE)
    return meta.lengths[split]


def retention_table(folder: Path, meta: Meta) -> list[str]:
    """Return the retention of the train split as the lines of a table."""
    found = retention_of(folder, meta)
    if not found["at_least"]:
        return [f"no document has {SHORTEST} tokens; the longest has {found['longest']:,}"]
    rows = [("context", "documents", "tokens", "of all"), *_rows(found, meta)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["text that can teach a context: what stands in documents of at least so many tokens"]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"  {'  '.join(cells)}")
    return [*lines, f"the longest document has {found['longest']:,} tokens"]


def retention_line(folder: Path, meta: Meta) -> str:
    """Return the retention of the train split in one line."""
    found = retention_of(folder, meta)
    shares = (f"{context}: {share}" for context, _, _, share in _rows(found, meta))
    listed = ", ".join(shares) or f"{SHORTEST}: none"
    return f"tokens in documents of at least {listed}; the longest has {found['longest']:,}"


def _rows(found: Mapping[str, Any], meta: Meta) -> list[tuple[str, str, str, str]]:
    """Return the cells of each context: it, documents, tokens, and their share of all tokens."""
    total = next(iter(meta.tokens.values()))
    return [
        (f"{context:,}", f"{documents:,}", f"{tokens:,}", _share(tokens, total))
        for context, documents, tokens in found["at_least"]
    ]


def _share(part: int, total: int) -> str:
    """Return a share in percent; what is more than nothing is not shown as nothing."""
    percent = 100 * part / max(1, total)
    return f"{percent:.0f} %" if percent >= 1 else f"{percent:.1g} %"

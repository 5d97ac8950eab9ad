"""Describe a token folder and the account of its source: what was read, and what was left out."""

from collections.abc import Iterator, Mapping
from typing import Any

from lcdist.data.meta import META
from lcdist.data.prepare.prepare import Prepared
from lcdist.data.prepare.retention import retention_table

# The options that read what is otherwise left out.
_OPTIONS = {"hidden folder": "--hidden", "linked folder": "--follow-links"}


def summary_lines(prepared: Prepared) -> list[str]:
    """Describe a token folder and what was left out, one fact per line."""
    meta = prepared.meta
    counts = ", ".join(f"{n:,} tokens for {split}" for split, n in meta.tokens.items())
    state = "wrote" if prepared.fresh else "already complete:"
    lines = [f"{state} {prepared.folder}: {counts}, vocabulary of {meta.vocab_size}"]
    if meta.targets is not None:
        shares = [f"{n:,} for {split}" for split, n in meta.targets.items()]
        lines.append(f"tokens of answers: {', '.join(shares)}")
    lines += _account_lines(meta.source)
    if meta.empty:
        lines.append(f"left out {meta.empty} documents without a character")
    if meta.skipped:
        num_skipped = len(meta.skipped)
        lines.append(f"skipped {num_skipped} unreadable documents, listed in {META}; the first:")
    for entry in meta.skipped[:3]:
        unit = next((f", {u} {entry[u]}" for u in ("line", "row") if entry.get(u)), "")
        lines.append(f"  {entry['file']}{unit}: {entry['reason']}")
    return [*lines, *retention_table(prepared.folder, meta)]


def _account_lines(source: Mapping[str, Any]) -> Iterator[str]:
    """Yield how many files of a source were seen, read and left out, if any was left out."""
    left_out: Mapping[str, int] = source["left_out"]
    if not left_out:
        return
    listed = ", ".join(f"{number} x {reason}" for reason, number in left_out.items())
    yield (
        f"files: {source['seen']} seen, {source['files']} read, {sum(left_out.values())} left out: "
        f"{listed}"
    )
    options = [option for reason, option in _OPTIONS.items() if reason in left_out]
    if options:
        yield f"to read those folders too, give {' and '.join(options)}"

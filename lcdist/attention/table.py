"""The README's table of attention methods, made from their facts."""

import dataclasses
from collections.abc import Iterable

from lcdist.attention.interface import AttentionMethod

COLUMNS = ("method", "paper", "options", "layouts", "exchange", "supports")


def method_table(methods: Iterable[AttentionMethod]) -> str:
    """Return the table as Markdown, one row per method, in order, without a final newline."""
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *map(_row, methods)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(method: AttentionMethod) -> tuple[str, ...]:
    options = [f"`{field.name}`" for field in dataclasses.fields(method.options)]
    return (
        f"`{method.name}`",
        f"[arXiv:{method.paper}](https://arxiv.org/abs/{method.paper})",
        ", ".join(options) or "none",
        ", ".join(method.layouts),
        " + ".join(method.exchange),
        ", ".join(sorted(method.supports)),
    )

"""The table of methods in the README, made from what the methods say of themselves."""

import dataclasses
from collections.abc import Iterable

from lcdist.attention.interface import AttentionMethod

COLUMNS = ("method", "paper", "options", "layouts", "exchange", "supports")


def method_table(methods: Iterable[AttentionMethod]) -> str:
    """Markdown, one row a method in the order given; no newline at its end."""
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

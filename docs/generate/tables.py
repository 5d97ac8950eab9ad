"""Write tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()
) -> str:
    """Return a table without a final newline.

    Args:
        head: Names of the columns.
        rows: Cells of each row, as Markdown.
        numbers: Columns that are aligned to the right.
    """
    marks = ["--:" if column in numbers else "---" for column in range(len(head))]
    lines = [head, marks, *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in cells)} |" for cells in lines)


def code(text: object) -> str:
    """Return a word in the type of code."""
    return f"`{text}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())

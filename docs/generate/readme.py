"""Write the README's tables, which its test compares with the code and the measured rows."""

import re
from collections.abc import Callable, Mapping

from docs.generate.benchmarks import gpu_summary
from docs.generate.methods import facts_table
from docs.generate.repository import ROOT

README = ROOT / "README.md"
TABLES: Mapping[str, Callable[[], str]] = {"methods": facts_table, "measured": gpu_summary}


def with_tables(text: str) -> str:
    """Return the README's text with its tables made anew, between their marks."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name}: python -m docs.generate -->", f"<!-- end of {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        table = f"{begin}\n\n{make()}\n\n{end}"
        text, count = pattern.subn(lambda _, table=table: table, text)
        assert count == 1, f"{README.name} has {count} places for {name}"
    return text

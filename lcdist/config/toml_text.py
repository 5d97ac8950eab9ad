"""Parse TOML that a user wrote, within limits of size and nesting."""

import tomllib
from typing import Any

from lcdist.config.values import MOST_LEVELS, is_too_deep

MOST_KEY_PARTS = 64


def parse_toml(text: str) -> dict[str, Any]:
    """Return the table of a TOML text; raise ValueError if it is none, or nested too deeply."""
    if any(_has_long_key(line) for line in text.splitlines() if line.count(".") > MOST_KEY_PARTS):
        raise ValueError(f"a key has more than {MOST_KEY_PARTS} parts")
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if is_too_deep(table):
        raise ValueError(f"it is nested in more than {MOST_LEVELS} levels")
    return table


def _has_long_key(line: str) -> bool:
    """Return whether a line has a dotted key of many parts, which tomllib reads in squared time."""
    parts = 0
    for part in line.split("."):
        word = part.strip()
        parts = parts + 1 if word and not {*word} & {*" \t,=[]"} else 0
        if parts > MOST_KEY_PARTS:
            return True
    return False

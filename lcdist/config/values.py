"""Describe values of a configuration in messages, and check texts, folders and nesting."""

from collections.abc import Mapping
from typing import Any

# Levels of tables and lists that the schema has at most, with some to spare.
MOST_LEVELS = 16
# Entries of a list, tables in a table of tables, and unknown keys that are named one by one.
MOST_ENTRIES = 4096
MOST_KEYS = 20
_SHOWN = 120
# Limits of Linux, in bytes: NAME_MAX, and PATH_MAX without its end.
_NAME_BYTES, _PATH_BYTES = 255, 4095


def shown(value: Any) -> str:
    """Return a value as a message shows it: without its middle if it is long."""
    try:
        text = repr(value)
    except ValueError:
        return "a number with more digits than Python prints"
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]}...{text[-half:]}"


def text_problem(text: str) -> str:
    """Return why a text cannot be written to a file or be part of a path; "" if it can."""
    if "\0" in text:
        return "holds a NUL character; remove it"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is not UTF-8; write it in UTF-8, and rename files that are not"
    return ""


def folder_problem(folder: str) -> str:
    """Return why a run cannot have this folder, whatever the machine; "" if it can."""
    if not folder.strip():
        return "name a folder, such as runs/first"
    if not folder.strip("/"):
        return "is the root of the file system; name a folder in it, such as /runs/first"
    longest = max(len(name.encode()) for name in folder.split("/"))
    if longest > _NAME_BYTES:
        return f"a name in it has {longest} bytes, and file systems take {_NAME_BYTES}; shorten it"
    if len(folder.encode()) > _PATH_BYTES:
        return f"has {len(folder.encode())} bytes, and paths have at most {_PATH_BYTES}; shorten it"
    return ""


def is_too_deep(table: Mapping[str, Any]) -> bool:
    """Return whether tables and lists are nested in more than `MOST_LEVELS` levels."""
    level: list[Any] = [table]
    for _ in range(MOST_LEVELS):
        level = [inner for value in level for inner in _entries(value)]
    return bool(level)


def _entries(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list) else []

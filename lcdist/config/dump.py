"""Write a configuration as TOML, defaults included, so that it can be read and loaded again."""

import dataclasses
import json
import re
from collections.abc import Mapping
from datetime import date, time
from typing import Any

from lcdist.config.schema import RawOptions


def dump(config: Any) -> str:
    """Return the configuration as TOML that `load` reads back to an equal one."""
    lines: list[str] = []
    _dump_table(config, "", lines)
    return "\n".join(lines).strip() + "\n"


def _dump_table(node: Any, path: str, lines: list[str]) -> None:
    table = _as_table(node)
    scalars = {k: v for k, v in table.items() if not _is_table(v)}
    if path and (scalars or not table):
        lines.extend(["", f"[{path}]"])
    lines.extend(f"{_key(key)} = {_scalar(value)}" for key, value in scalars.items())
    for key, value in table.items():
        if _is_table(value):
            _dump_table(value, f"{path}.{_key(key)}" if path else _key(key), lines)


def _is_table(value: Any) -> bool:
    return dataclasses.is_dataclass(value) or isinstance(value, Mapping)


def _as_table(node: Any) -> dict[str, Any]:
    if isinstance(node, RawOptions):
        return dict(node.table)
    if isinstance(node, Mapping):
        return dict(node)
    table: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if field.metadata.get("flattened"):
            table.update(_as_table(value))
        elif value is not None:  # TOML has no null: leave the key out
            table[field.name] = value
    return table


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _quoted(key)


def _quoted(text: str) -> str:
    # JSON's escapes are legal in TOML; TOML also needs DEL escaped, which JSON does not.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_scalar(v)}" for k, v in value.items()) + "}"
    if isinstance(value, date | time):
        return value.isoformat()
    return repr(value)

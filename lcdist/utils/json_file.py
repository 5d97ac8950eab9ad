"""Read JSON files that may be damaged or written by others, and check their types."""

import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcdist.utils.errors import shortened

# A number of steps, bytes or tokens beyond it is damage; Python's integers have no limit.
_LARGEST_INT = 2**63 - 1
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_json(path: Path, remedy: str = "") -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file.
        remedy: what the user can do if the file is damaged.

    Raises:
        ValueError: it is not JSON; the message names the line where it can.
        OSError: it cannot be read.
    """
    end = f"; {remedy}" if remedy else ""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}{end}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}){end}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: JSON that is nested too deeply{end}") from error
    except ValueError as error:
        raise ValueError(f"{path}: JSON that cannot be read: {error}{end}") from error


def read_object(path: Path, hints: Mapping[str, Any], remedy: str = "") -> dict[str, Any]:
    """Return the content of a JSON file that holds an object.

    Args:
        path: the file.
        hints: type of each key that has to be there; other keys are not checked.
        remedy: as of `read_json`.

    Raises:
        ValueError: as `read_json`; or the content is not such an object.
        OSError: it cannot be read.
    """
    table = read_json(path, remedy)
    check_types(table, hints, str(path), remedy)
    return table


def check_types(table: Any, hints: Mapping[str, Any], where: str, remedy: str = "") -> None:
    """Raise ValueError unless `table` is an object with keys of the types `hints`.

    Args:
        table: what was read.
        hints: type of each key: int, float, str, bool, dict, list, and unions of these.
        where: begins the message, such as a path; may be empty.
        remedy: ends the message.
    """
    begin, end = f"{where}: " if where else "", f"; {remedy}" if remedy else ""
    if not isinstance(table, dict):
        raise ValueError(f"{begin}expected an object, got {type(table).__name__}{end}")
    for key, hint in hints.items():
        if key not in table:
            raise ValueError(f"{begin}key {key!r} is missing{end}")
        if not fits(table[key], hint):
            found = shortened(json.dumps(table[key])[:1000])
            raise ValueError(f"{begin}{key} = {found}: expected {_name(hint)}{end}")


def fits(value: Any, hint: Any) -> bool:
    """Return whether a value read from JSON is of the type `hint`; numbers are finite."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, each) for each in arguments)
    if origin is dict:
        return isinstance(value, dict) and all(fits(v, arguments[1]) for v in value.values())
    if origin is list:
        return isinstance(value, list) and all(fits(each, arguments[0]) for each in value)
    if hint is bool or hint is types.NoneType:
        return isinstance(value, hint)
    if isinstance(value, bool):
        return False
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return isinstance(value, (int, float) if hint is float else hint)


def _name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(_name, arguments))
    if origin is dict or hint is dict:
        return f"an object of {_name(arguments[1])}" if arguments else "an object"
    if origin is list or hint is list:
        return f"a list of {_name(arguments[0])}" if arguments else "a list"
    return "null" if hint is types.NoneType else _NAMES[hint]

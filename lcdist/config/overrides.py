"""Apply `section.key=value` words to the table of a configuration."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple, get_args

from lcdist.config.build import section_hint
from lcdist.config.rope import Rope
from lcdist.config.schema import OPTIONS
from lcdist.config.toml_text import parse_toml
from lcdist.config.values import MOST_LEVELS, shown

log = logging.getLogger(__name__)

_WORDS = re.compile(r"\[ *[A-Za-z_][\w-]*( *, *[A-Za-z_][\w-]*)* *\]")


class _Choice(NamedTuple):
    """A table with a key that chooses between kinds of options.

    Attributes:
        place: Path of the table.
        key: The key that chooses.
        default: Its default.
        dropped: Returns the options of the first choice that do not go with the second.
    """

    place: tuple[str, ...]
    key: str
    default: str
    dropped: Callable[[str, str], set[str]]


def _method_options(before: str, after: str) -> set[str]:
    """Return all options of a method: another method's option of the same name is another."""
    return {field.name for field in fields(OPTIONS[before])} if before in OPTIONS else set()


def _scaling_options(before: str, after: str) -> set[str]:
    """Return the keys that only one scaling has: those of the same name mean the same."""
    keys = {kind.scaling: {field.name for field in fields(kind)} for kind in get_args(Rope)}
    return keys.get(before, set()) - keys[after] if after in keys else set()


_CHOICES = (
    _Choice(("attention",), "method", "full", _method_options),
    _Choice(("model", "rope"), "scaling", "none", _scaling_options),
)


def merge_overrides(
    table: Mapping[str, Any], overrides: Sequence[str], errors: list[str]
) -> dict[str, Any]:
    """Return a copy of a TOML table with `section.key=value` words applied.

    A word that chooses another attention method, or another scaling of the rotation, leaves out the
    options that the table has for its own.

    Args:
        table: The table.
        overrides: The words.
        errors: Gets a line for every mistake.
    """
    merged = _copy(table)
    written = {_apply_override(merged, override, errors) for override in overrides}
    for choice in _CHOICES:
        if (*choice.place, choice.key) in written:
            _leave_out(choice, _inner(table, choice.place), _inner(merged, choice.place), written)
    return merged


def _inner(table: Any, place: Sequence[str]) -> dict[str, Any]:
    """Return the table at a path; an empty one if there is none."""
    for key in place:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table if isinstance(table, dict) else {}


def _leave_out(
    choice: _Choice,
    before: Mapping[str, Any],
    after: dict[str, Any],
    written: set[tuple[str, ...]],
) -> None:
    """Take options of the file's choice out of `after`, if an override has made another choice."""
    old, new = before.get(choice.key, choice.default), after[choice.key]
    if old == new or not isinstance(old, str) or not isinstance(new, str):
        return
    foreign = choice.dropped(old, new)
    dropped = [k for k in before if k in foreign and (*choice.place, k) not in written]
    for key in dropped:
        del after[key]
    if dropped:
        place = ".".join(choice.place)
        names = ", ".join(f"{place}.{key} = {shown(before[key])}" for key in dropped)
        log.warning("%s.%s=%s leaves out %s, written for %s", place, choice.key, new, names, old)


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in table.items()}


def _apply_override(table: dict[str, Any], override: str, errors: list[str]) -> tuple[str, ...]:
    """Apply one `section.key=value` word; return the path of its key, empty after a mistake."""
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not 2 <= len(keys) <= MOST_LEVELS or not all(keys):
        errors.append(
            f"override {shown(override)}: expected section.key=value{section_hint(path.strip())}"
        )
        return ()
    text = text.strip()
    try:
        parsed = parse_toml(f"value = {text}")
    except ValueError as error:
        if _WORDS.fullmatch(text):
            parsed = {"value": [word.strip() for word in text[1:-1].split(",")]}
        elif text.startswith(("'", '"', "[", "{")):
            errors.append(f"override {shown(override)}: the value is not TOML ({error})")
            return ()
        else:
            parsed = {}
    # A shell strips quotes: a word that is not a TOML value is a string, also in a list of words.
    value = parsed["value"] if len(parsed) == 1 else text
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            errors.append(
                f"override {shown(override)}: '{'.'.join(keys[: depth + 1])}' is not a table"
            )
            return ()
    table[keys[-1]] = value
    return tuple(keys)

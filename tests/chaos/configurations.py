"""Generate configurations: valid and absurd values for every key of the schema."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

from lcdist.config import dump, parse
from lcdist.config.schema import OPTIONS, Config
from lcdist.plan import make_plan, plan_rows
from tests.chaos.inputs import ABSURD, Kind
from tests.chaos.tally import REFUSED
from tests.model.small import TABLE

MEANING = (
    "`parse` and `make_plan` succeed, and the dump is read back as the same configuration; or "
    "ConfigError or ValueError, at most one line a mistake"
)
UNIONS = (types.UnionType, typing.Union)
SIZES = [1, 2, 3, 4, 8, 16, 64, 96, 128, 250, 256, 1000, 4096, 32768, 10**6]
NUMBERS = [1e-8, 1e-3, 0.1, 0.5, 0.9, 1.0, 2.0, 8.0, 1e4, 1e9]
WORLDS = [1, 1, 1, 1, 2, 4, 3, 10**6]


def keys_of(cls: type, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the type of every key of a dataclass of the schema."""
    for name, hint in typing.get_type_hints(cls).items():
        path = f"{where}.{name}" if where else name
        members = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
        for member in members:
            if dataclasses.is_dataclass(member):
                yield from keys_of(typing.cast(type, member), path)
            elif member is not types.NoneType and name not in ("options", "others"):
                yield path, member


def _keys() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for path, hint in keys_of(Config):
        found.setdefault(path, []).append(hint)
    for method, options in OPTIONS.items():
        for path, hint in keys_of(options):
            found.setdefault(f"attention.{path}", []).append(hint)
            found.setdefault(f"attention.{method}.{path}", []).append(hint)
    return found


KEYS = _keys()


def values(hints: list[Any]) -> st.SearchStrategy:
    """Generate values of a key's type."""
    return st.one_of(*map(_of_type, hints))


def _of_type(hint: Any) -> st.SearchStrategy:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(_of_type(arguments[0]), max_size=3)
    if origin is Mapping:
        table = st.fixed_dictionaries({"path": st.just("nowhere"), "weight": _of_type(float)})
        return st.dictionaries(st.sampled_from(["a", "b c", "é"]), table, max_size=2)
    if origin in UNIONS:
        return st.one_of(*(_of_type(each) for each in arguments if each is not types.NoneType))
    if hint is str:
        return st.sampled_from(["", "x", "scca", "full@0", "coca@0,-1 full@1::2", "1-3", "[x]"])
    plain = {bool: st.booleans(), int: st.sampled_from(SIZES), float: st.sampled_from(NUMBERS)}
    return plain[hint]


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Generate a world size and values for up to eight keys; half have no absurd value."""
    most = draw(st.sampled_from([2, 3, 8]))
    chosen = draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=most, unique=True))
    method, sane = draw(st.sampled_from([*OPTIONS, "full"])), draw(st.booleans())
    keys: dict[str, Any] = {"attention.method": method}
    if sane:
        legal = {f"attention.{field.name}" for field in dataclasses.fields(OPTIONS[method])}
        places = ("attention.", "model.rope.")
        chosen = [path for path in chosen if path in legal or not path.startswith(places)]
    for path in chosen:
        own = values(KEYS[path])
        keys[path] = draw(own if sane else st.one_of(own, ABSURD))
    return {"world": draw(st.sampled_from(WORLDS)), "keys": keys}


def attempt(value: Any, folder: Path) -> str | None:
    """Parse and plan; return what went wrong."""
    table: dict[str, Any] = {section: dict(keys) for section, keys in TABLE.items()}
    for path, entry in value["keys"].items():
        *sections, key = path.split(".")
        node: Any = table
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[key] = entry
    try:
        config = parse(table)
        again = parse(tomllib.loads(dump(config)))
        if again != config:
            return "the dump is another configuration"
        plan_rows(make_plan(config, value["world"]))
    except ValueError as error:
        lines = str(error).splitlines()
        if not lines or max(map(len, lines)) > 2000 or len(lines) > 60:
            return f"a message of {len(lines)} lines, {len(str(error))} characters"
        return REFUSED
    return None


CONFIGURATIONS = Kind("configurations", MEANING, 1000, configurations(), attempt)

"""Make the reference of the configuration from its schema: every key, its type and default."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Literal

from docs.generate.schema_docs import key_docs, summary
from docs.generate.tables import code, markdown_table
from lcdist.config.build import REPLACED
from lcdist.config.methods import OPTIONS
from lcdist.config.schema import Config

HEAD = ("key", "type", "default", "what it says")
MEANT_LIMIT = 100
TAG = "scaling"
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}
# Keys that are replaced before the dataclasses are built, and so are fields of none of them.
READ_FIRST: Mapping[str, tuple[tuple[str, str, str], ...]] = {
    "model": (
        (
            "from",
            "text",
            "Checkpoint whose settings of the model hold, and whose weights the run starts from. "
            "A key of `[model]` that is written and differs is refused. "
            "Only `plan` and `train` read it.",
        ),
    ),
    "model.rope": (
        (
            "extend",
            "text",
            'How the rotation of `model.from` is extended: `"pi:4"`, `"ntk:4"`, `"yarn:4"` or '
            '`"llama3:4"` for four times its context, `"base:8e6"` for another base.',
        ),
    ),
}


def configuration_reference() -> str:
    """Return all sections of the configuration as Markdown."""
    return "\n".join(_sections())


def documented_keys() -> set[str]:
    """Return the dotted names of all keys that the schema has, options of methods included."""
    return {
        f"{path}.{field.name}" for path, cls in _tables() for field in dataclasses.fields(cls)
    } - {"attention.options", "attention.others"}


def _tables() -> Iterator[tuple[str, type]]:
    """Yield every table with keys of its own: its dotted name, and its dataclass."""
    for section, hint in typing.get_type_hints(Config).items():
        yield section, hint
        for name, inner in typing.get_type_hints(hint).items():
            yield from ((f"{section}.{name}", each) for each in _classes(inner))
    yield from (("attention", options) for options in OPTIONS.values())


def _sections() -> Iterator[str]:
    for section, hint in typing.get_type_hints(Config).items():
        yield f"## `[{section}]`\n\n{summary(hint)}\n"
        yield from _keys(section, hint)
        for name, inner in typing.get_type_hints(hint).items():
            yield from _inner_tables(section, name, inner)
        if section == "attention":
            for method, options in OPTIONS.items():
                yield f"### Options of `{method}`\n\n{summary(options)}\n"
                yield from _keys(section, options)


def _inner_tables(section: str, name: str, hint: Any) -> Iterator[str]:
    """Yield the tables inside a section: of a mapping, or of each kind of a tagged union."""
    classes = _classes(hint)
    if not classes:
        return
    path = f"{section}.{name}"
    is_mapping = typing.get_origin(hint) is Mapping
    if not is_mapping and path in REPLACED:
        yield f"### `[{path}]`\n"
        yield _table([_read_first(path, row) for row in READ_FIRST[path]])
    for cls in classes:
        if is_mapping:
            yield f"### `[{path}.NAME]`\n\n{summary(cls)}\n"
        else:
            tag = typing.get_args(typing.get_type_hints(cls)[TAG])[0]
            yield f'### `[{path}]` with `{TAG} = "{tag}"`\n\n{summary(cls)}\n'
        yield from _keys(path, cls)


def _classes(hint: Any) -> list[type]:
    """Return the dataclasses that a field's type consists of: none for a plain value."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union, Mapping):
        members = typing.get_args(hint)
        return [each for each in members if isinstance(each, type) and is_dataclass(each)]
    return []


def _keys(path: str, cls: type) -> Iterator[str]:
    docs, hints = key_docs(cls), typing.get_type_hints(cls)
    rows = [
        (
            code(field.name),
            _type(hints[field.name], field),
            _default(field),
            _sentence(docs[field.name]),
        )
        for field in dataclasses.fields(cls)
        if not (field.metadata.get("flattened") or _classes(hints[field.name]) or _is_tag(field))
    ]
    rows += [_read_first(path, row) for row in READ_FIRST.get(path, ()) if path == "model"]
    if rows:
        yield _table(rows)


def _is_tag(field: dataclasses.Field[Any]) -> bool:
    """Return whether the field tells kinds of a table apart; its value stands in the heading."""
    return field.name == TAG


def _read_first(path: str, row: tuple[str, str, str]) -> tuple[str, str, str, str]:
    name, kind, text = row
    assert name in REPLACED[path]
    return code(name), kind, "none", text


def _table(rows: list[tuple[str, ...]]) -> str:
    return markdown_table(HEAD, rows) + "\n"


def _type(hint: Any, field: dataclasses.Field[Any]) -> str:
    """Return the type of a key in words, with its legal values or bounds."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " ".join(code(_toml(value)) for value in args)
    if origin is tuple:
        return f"list of {_type(args[0], field)}"
    if origin in (types.UnionType, typing.Union):
        members = [each for each in args if each is not types.NoneType]
        return " or ".join(_type(each, field) for each in members)
    low, above, limit = (field.metadata.get(key) for key in ("min", "above", "limit"))
    bounds = [f"≥ {low:g}"] if low is not None else []
    bounds += [f"> {above:g}"] if above is not None else []
    # Greater limits are far beyond any run.
    bounds += [f"≤ {limit.most:g}"] if limit is not None and limit.most <= MEANT_LIMIT else []
    return f"{_WORDS[hint]} {', '.join(bounds)}" if bounds and hint is not str else _WORDS[hint]


def _default(field: dataclasses.Field[Any]) -> str:
    """Return the default of a key as TOML would write it."""
    value = field.default
    if value is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return "**required**"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, tuple):
        return code(f"[{', '.join(_toml(each) for each in value)}]")
    return code(_toml(value))


def _sentence(text: str) -> str:
    """Return a comment as a sentence; values and keys that it begins with stay as they are."""
    text = text.replace("None:", "none:")
    if text and not re.match(r"\w+:|\w+_\w+", text):
        text = text[0].upper() + text[1:]
    return text if not text or text.endswith((".", ",")) else f"{text}."


def _toml(value: Any) -> str:
    return (
        f'"{value}"' if isinstance(value, str) else f"{value:_}" if _is_long(value) else f"{value}"
    )


def _is_long(value: Any) -> bool:
    return isinstance(value, int) and abs(value) >= 10_000

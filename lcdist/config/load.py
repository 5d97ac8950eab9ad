"""TOML to the typed tree and back: strict, and every mistake reported at once.

A key nobody knows, a wrong type, a value out of range: each is an error that names the key, the
value and what would be legal. All of them are collected and raised together as one `ConfigError`.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lcdist.config.schema import OPTIONS, Config, RawOptions

_NAMES = {bool: "bool", int: "int", float: "float", str: "str"}


class ConfigError(ValueError):
    """What is wrong with a configuration, one line a mistake (`errors`)."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        # Ranks tell each other of it by pickle, which would make it again from the joined text.
        return type(self), (self.errors,)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file `path`, with `section.key=value` overrides applied.

    Raises ConfigError naming the file where it cannot be read, and every mistake otherwise.
    """
    return parse(read_table(path), overrides)


def read_table(path: str | Path) -> dict[str, Any]:
    """The TOML file `path`. Raises ConfigError naming the file where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"cannot read configuration {path}: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"cannot read configuration {path}: not UTF-8 ({error})"]) from error
    try:
        return tomllib.loads(text)
    except ValueError as error:
        # Not TOMLDecodeError alone: an endless integer is a plain ValueError.
        raise ConfigError([f"cannot read configuration {path}: not TOML ({error})"]) from error


def parse(table: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """The typed tree of a TOML table. Raises ConfigError with every mistake in it."""
    errors: list[str] = []
    merged = _plain(table)
    for override in overrides:
        _apply(merged, override, errors)
    config = build(Config, merged, "", errors)
    if errors or config is None:
        raise ConfigError(errors)
    return config


def build(cls: type, table: Any, where: str, errors: list[str]) -> Any:
    """An instance of the dataclass `cls` from `table`, or None with reasons added to `errors`.

    `where` is the dotted path of the table, for the messages.
    """
    if not isinstance(table, Mapping):
        errors.append(f"{where} = {table!r}: expected a table of keys, got {_kind(table)}")
        return None
    before = len(errors)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    known = [name for name, f in fields.items() if not f.metadata.get("flattened")]
    rest = {key: value for key, value in table.items() if key not in known}
    for name in known:
        field, path = fields[name], _join(where, name)
        given = table.get(name)
        if given is None and _has_default(field):
            continue
        if given is None and not dataclasses.is_dataclass(hints[name]):
            errors.append(f"missing key '{path}': it has no default")
            continue
        # A missing section is an empty one, so that each key it should have is named.
        typed = len(errors)
        values[name] = _value(hints[name], {} if given is None else given, path, errors)
        if len(errors) == typed:
            _check_range(field, values[name], path, errors)
    if "others" in fields:
        values["others"], rest = _others(values.get("layers", ""), rest, where, errors)
        method = values.get("method", fields["method"].default)
        values["options"], rest = _options(method, rest, where, known, errors), {}
    for key in rest:
        errors.append(_unknown(key, known, where))
    return None if len(errors) > before else cls(**values)


def build_options(cls: type, raw: RawOptions) -> Any:
    """Options of a method that came through an entry point, typed as strictly as built-in ones."""
    errors: list[str] = []
    options = build(cls, raw.table, "attention", errors)
    if errors:
        raise ConfigError(errors)
    return options


def _plain(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _plain(v) if isinstance(v, Mapping) else v for k, v in table.items()}


def _apply(table: dict[str, Any], override: str, errors: list[str]) -> None:
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or len(keys) < 2 or not all(keys):
        errors.append(f"override {override!r}: expected section.key=value{_place(path.strip())}")
        return
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError as error:
        if text.startswith(("'", '"', "[", "{")):
            errors.append(f"override {override!r}: the value is not TOML ({error})")
            return
        parsed = {}
    # A shell strips quotes: a word that is no TOML value stands for itself.
    value = parsed["value"] if len(parsed) == 1 else text
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            errors.append(f"override {override!r}: '{'.'.join(keys[: depth + 1])}' is not a table")
            return
    table[keys[-1]] = value


def _others(
    layers: Any, table: dict[str, Any], where: str, errors: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options of other layers' methods, each a table under its method's name; and the rest."""
    named = {word.partition("@")[0] for word in layers.split()} if isinstance(layers, str) else {}
    given = {k: v for k, v in table.items() if isinstance(v, Mapping) and k in {*named, *OPTIONS}}
    others = {
        method: _options(method, dict(options), _join(where, method), [], errors)
        for method, options in given.items()
    }
    return others, {key: value for key, value in table.items() if key not in given}


def _options(
    method: Any, table: dict[str, Any], where: str, siblings: list[str], errors: list[str]
) -> Any:
    if not isinstance(method, str) or method not in OPTIONS:
        return RawOptions(table=table)
    cls = OPTIONS[method]
    legal = {f.name for f in dataclasses.fields(cls)}
    for key in [key for key in table if key not in legal]:
        errors.append(_unknown(key, [*siblings, *sorted(legal)], where))
    return build(cls, {k: v for k, v in table.items() if k in legal}, where, errors)


def _unknown(key: str, known: Sequence[str], where: str) -> str:
    hint = _place(key)
    close = difflib.get_close_matches(key, known, n=1)
    if not hint and close:
        hint = f"; did you mean '{_join(where, close[0])}'?"
    return f"unknown key '{_join(where, key)}'{hint or '; known keys: ' + ', '.join(known)}"


def _place(key: str) -> str:
    """A hint where `key` stands alone or in the wrong section and another section has it."""
    for section, hint in typing.get_type_hints(Config).items():
        if key in {f.name for f in dataclasses.fields(hint) if not f.metadata.get("flattened")}:
            return f"; did you mean '{section}.{key}'?"
    return ""


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _has_default(field: Any) -> bool:
    absent = dataclasses.MISSING
    return field.default is not absent or field.default_factory is not absent


def _kind(value: Any) -> str:
    return "table" if isinstance(value, Mapping) else type(value).__name__


def _value(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    origin = typing.get_origin(hint)
    if origin is Literal:
        legal = typing.get_args(hint)
        if value not in legal or isinstance(value, bool):
            errors.append(f"{path} = {value!r}: must be one of {', '.join(map(str, legal))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            errors.append(f"{path} = {value!r}: expected a list, got {_kind(value)}")
            return value
        item = typing.get_args(hint)[0]
        return tuple(_value(item, v, f"{path}[{i}]", errors) for i, v in enumerate(value))
    if origin is Mapping:
        return _named(typing.get_args(hint)[1], value, path, errors)
    if origin in (types.UnionType, typing.Union):
        return _union(typing.get_args(hint), value, path, errors)
    return _one(hint, value, path, errors)


def _one(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    """A value that is not made of others, or a table of the schema."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, path, errors)
    if hint is float and type(value) is int:
        if abs(value) < 2**1023:
            return float(value)
        errors.append(f"{path}: the number is too large for a float")
        return value
    if type(value) is not hint:
        expected = _NAMES.get(hint, str(hint))
        errors.append(f"{path} = {value!r}: expected {expected}, got {_kind(value)}")
    return value


def _named(item: Any, value: Any, path: str, errors: list[str]) -> Any:
    """Tables under names that the user chooses."""
    if not isinstance(value, Mapping):
        errors.append(f"{path} = {value!r}: expected a table of tables, got {_kind(value)}")
        return value
    return {name: _value(item, each, _join(path, name), errors) for name, each in value.items()}


def _union(members: Sequence[type], value: Any, path: str, errors: list[str]) -> Any:
    """A type or None; or a tagged union: the members share a field, a Literal with one value."""
    if types.NoneType in members:
        # None is the default alone: TOML has no word for it.
        [member] = [m for m in members if m is not types.NoneType]
        return _value(member, value, path, errors)
    tag, choices = _tags(members)
    if not isinstance(value, Mapping):
        errors.append(f"{path} = {value!r}: expected a table of keys, got {_kind(value)}")
        return None
    chosen = value.get(tag, next(iter(choices)))
    if not isinstance(chosen, str) or chosen not in choices:
        errors.append(f"{path}.{tag} = {chosen!r}: must be one of {', '.join(choices)}")
        return None
    return build(choices[chosen], value, path, errors)


def _tags(members: Sequence[type]) -> tuple[str, dict[str, type]]:
    for name, hint in typing.get_type_hints(members[0]).items():
        if typing.get_origin(hint) is Literal:
            hints = [typing.get_type_hints(member)[name] for member in members]
            tags = [typing.get_args(member_hint)[0] for member_hint in hints]
            return name, dict(zip(tags, members, strict=True))
    raise AssertionError("a union in the schema needs a Literal tag")


def _check_range(field: Any, value: Any, path: str, errors: list[str]) -> None:
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_range(field, item, f"{path}[{i}]", errors)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    low, above = field.metadata.get("min"), field.metadata.get("above")
    if isinstance(value, float) and not math.isfinite(value):
        errors.append(f"{path} = {value}: must be finite")
    elif low is not None and value < low:
        errors.append(f"{path} = {value}: must be at least {low}")
    elif above is not None and value <= above:
        errors.append(f"{path} = {value}: must be greater than {above}")

"""Build the configuration's dataclasses from TOML tables.

Unknown keys, wrong types and values out of range are errors. Each names the key, the value and what
is legal. They are collected and raised as one `ConfigError`.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from lcdist.config.schema import OPTIONS, Config, RawOptions
from lcdist.config.values import MOST_ENTRIES, MOST_KEYS, folder_problem, shown, text_problem

# Keys that `lcdist.config.source` replaces by others before the dataclasses are built.
REPLACED = {"model": ("from",), "model.rope": ("extend",)}
_TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


class ConfigError(ValueError):
    """Mistakes in a configuration: `errors` has one line each."""

    def __init__(self, errors: Iterable[str]) -> None:
        self.errors = tuple(errors)
        super().__init__("\n".join(self.errors))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        # Ranks send it to each other by pickle, which would rebuild it from the joined text.
        return type(self), (self.errors,)


def build(cls: type, table: Any, where: str, errors: list[str]) -> Any:
    """Build an instance of a dataclass from a TOML table.

    Args:
        cls: The dataclass.
        table: The table; anything else is an error.
        where: Dotted path of the table, for messages.
        errors: Gets a line for every mistake.

    Returns:
        The instance, or None if errors were added.
    """
    if not isinstance(table, Mapping):
        errors.append(
            f"{where} = {shown(table)}: expected a table of keys, got {_type_name(table)}"
        )
        return None
    errors_before = len(errors)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    known = [name for name, f in fields.items() if not f.metadata.get("flattened")]
    unknown = {key: value for key, value in table.items() if key not in known}
    for name in known:
        field, path = fields[name], _join(where, name)
        value = table.get(name)
        if value is None and _has_default(field):
            continue
        if value is None and not dataclasses.is_dataclass(hints[name]):
            errors.append(f"missing key '{path}': it has no default")
            continue
        # Treat a missing section as empty, so that every missing key is reported.
        field_errors = len(errors)
        values[name] = _convert(hints[name], {} if value is None else value, path, errors)
        if len(errors) == field_errors:
            _check_range(field, values[name], path, errors)
    if "others" in fields:
        values["others"], unknown = _other_options(values.get("layers", ""), unknown, where, errors)
        method = values.get("method", fields["method"].default)
        values["options"], unknown = _method_options(method, unknown, where, known, errors), {}
    errors.extend(_unknown_keys(list(unknown), [*known, *REPLACED.get(where, ())], where))
    return None if len(errors) > errors_before else cls(**values)


def build_options(cls: type, raw: RawOptions) -> Any:
    """Build the options of a method from another package, as strictly as built-in ones."""
    errors: list[str] = []
    options = build(cls, raw.table, "attention", errors)
    if errors:
        raise ConfigError(errors)
    return options


def _other_options(
    layers: Any, table: dict[str, Any], where: str, errors: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the tables of other layers' methods off `[attention]`.

    Returns:
        Options by method name, and the keys that are left.
    """
    named = {word.partition("@")[0] for word in layers.split()} if isinstance(layers, str) else {}
    tables = {k: v for k, v in table.items() if isinstance(v, Mapping) and k in {*named, *OPTIONS}}
    others = {
        method: _method_options(method, dict(options), _join(where, method), [], errors)
        for method, options in tables.items()
    }
    return others, {key: value for key, value in table.items() if key not in tables}


def _method_options(
    method: Any, table: dict[str, Any], where: str, siblings: list[str], errors: list[str]
) -> Any:
    """Build a method's options; raw ones for a method of another package.

    Args:
        method: Name of the method.
        table: Its options.
        where: Dotted path of the table, for messages.
        siblings: Other keys that are legal in the same table, to suggest.
        errors: Gets a line for every mistake.
    """
    if not isinstance(method, str) or method not in OPTIONS:
        return RawOptions(table=table)
    cls = OPTIONS[method]
    legal = {f.name for f in dataclasses.fields(cls)}
    unknown = [key for key in table if key not in legal]
    errors.extend(_unknown_keys(unknown, [*siblings, *sorted(legal)], where))
    return build(cls, {k: v for k, v in table.items() if k in legal}, where, errors)


def _unknown_keys(unknown: Sequence[str], known: Sequence[str], where: str) -> Iterator[str]:
    for key in unknown[:MOST_KEYS]:
        yield _unknown_key(key, known, where)
    if len(unknown) > MOST_KEYS:
        yield f"{len(unknown) - MOST_KEYS} more unknown keys in {where or 'the file'}"


def _unknown_key(key: str, known: Sequence[str], where: str) -> str:
    if key in REPLACED.get(where, ()):
        name = _join(where, key)
        return f"key '{name}': only 'lcdist plan' and 'lcdist train' read it; leave it out"
    hint = section_hint(key)
    close = difflib.get_close_matches(key[:100], known, n=1)
    if not hint and close:
        hint = f"; did you mean '{_join(where, close[0])}'?"
    name = _join(where, shown(key)[1:-1])
    return f"unknown key '{name}'{hint or '; known keys: ' + ', '.join(known)}"


def section_hint(key: str) -> str:
    """Return a hint if another section has `key`, else an empty string."""
    for section, hint in typing.get_type_hints(Config).items():
        if key in {f.name for f in dataclasses.fields(hint) if not f.metadata.get("flattened")}:
            return f"; did you mean '{section}.{key}'?"
    return ""


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _has_default(field: Any) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _type_name(value: Any) -> str:
    if isinstance(value, Mapping | list):
        return "a table" if isinstance(value, Mapping) else "a list"
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def _convert(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    """Convert a TOML value to the type `hint`; mistakes are added to `errors`."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        legal = typing.get_args(hint)
        if value not in legal or isinstance(value, bool):
            errors.append(f"{path} = {shown(value)}: must be one of {', '.join(map(str, legal))}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            errors.append(f"{path} = {shown(value)}: expected a list, got {_type_name(value)}")
            return value
        if len(value) > MOST_ENTRIES:
            errors.append(f"{path} has {len(value)} entries: at most {MOST_ENTRIES} are legal")
            return value
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, v, f"{path}[{i}]", errors) for i, v in enumerate(value))
    if origin is Mapping:
        return _convert_tables(typing.get_args(hint)[1], value, path, errors)
    if origin in (types.UnionType, typing.Union):
        return _convert_union(typing.get_args(hint), value, path, errors)
    return _convert_single(hint, value, path, errors)


def _convert_single(hint: Any, value: Any, path: str, errors: list[str]) -> Any:
    """Convert a scalar or a table of the schema."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, path, errors)
    if hint is float and type(value) is int:
        if abs(value) < 2**1023:
            return float(value)
        errors.append(f"{path}: the number is too large for a float")
        return value
    if type(value) is not hint:
        expected = _TYPE_NAMES.get(hint, str(hint))
        errors.append(f"{path} = {shown(value)}: expected {expected}, got {_type_name(value)}")
    elif hint is str and (problem := text_problem(value)):
        errors.append(f"{path} = {shown(value)}: {problem}")
    return value


def _convert_tables(item: Any, value: Any, path: str, errors: list[str]) -> Any:
    """Convert tables whose names the user chooses."""
    if not isinstance(value, Mapping):
        errors.append(
            f"{path} = {shown(value)}: expected a table of tables, got {_type_name(value)}"
        )
        return value
    if len(value) > MOST_ENTRIES:
        errors.append(f"{path} has {len(value)} tables: at most {MOST_ENTRIES} are legal")
        return value
    errors += [f"{path}.{shown(name)}: {why}" for name in value if (why := text_problem(name))]
    return {name: _convert(item, each, _join(path, name), errors) for name, each in value.items()}


def _convert_union(members: Sequence[type], value: Any, path: str, errors: list[str]) -> Any:
    """Convert an optional value, a scalar of several types, or a tagged union.

    The members of a tagged union share a field, the tag: a Literal with one value each.
    """
    if types.NoneType in members:
        # None can only be the default: TOML has no null.
        [member] = [m for m in members if m is not types.NoneType]
        return _convert(member, value, path, errors)
    if all(member in _TYPE_NAMES for member in members):
        if type(value) not in members:
            expected = " or ".join(_TYPE_NAMES[member] for member in members)
            errors.append(f"{path} = {shown(value)}: expected {expected}, got {_type_name(value)}")
        return value
    tag, choices = _tags(members)
    if not isinstance(value, Mapping):
        errors.append(f"{path} = {shown(value)}: expected a table of keys, got {_type_name(value)}")
        return None
    chosen = value.get(tag, next(iter(choices)))
    if not isinstance(chosen, str) or chosen not in choices:
        errors.append(f"{path}.{tag} = {shown(chosen)}: must be one of {', '.join(choices)}")
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
    if field.metadata.get("folder") and (problem := folder_problem(value)):
        errors.append(f"{path} = {shown(value)}: {problem}")
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            _check_range(field, item, f"{path}[{i}]", errors)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    low, above, limit = (field.metadata.get(key) for key in ("min", "above", "limit"))
    if isinstance(value, float) and not math.isfinite(value):
        errors.append(f"{path} = {value}: must be finite")
    elif low is not None and value < low:
        errors.append(f"{path} = {value}: must be at least {low}")
    elif above is not None and value <= above:
        errors.append(f"{path} = {value}: must be greater than {above}")
    elif limit is not None and value > limit.most:
        most = f"{limit.most:,}" if isinstance(limit.most, int) else f"{limit.most:g}"
        errors.append(
            f"{path} = {shown(value)}: must be at most {most} {limit.unit}".rstrip()
            + f" ({limit.reason})"
        )

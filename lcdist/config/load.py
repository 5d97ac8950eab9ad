"""Load TOML into the typed configuration, strictly, with all mistakes reported together."""

import tomllib
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lcdist.config.build import ConfigError, build, section_hint
from lcdist.config.schema import Config
from lcdist.config.values import MOST_LEVELS, is_too_deep, shown

# A configuration has a few KiB; Python parses about a MiB of TOML a second.
MOST_BYTES = 2**20
MOST_KEY_PARTS = 64


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load the configuration in the TOML file `path`.

    Args:
        path: The file.
        overrides: `section.key=value` words that replace values of the file.

    Raises:
        ConfigError: If the file cannot be read, with its name; else with every mistake.
    """
    return parse(read_table(path), overrides)


def read_table(path: str | Path) -> dict[str, Any]:
    """Read the TOML file `path`; raise ConfigError with its name if it cannot be read."""
    begin = f"cannot read configuration {path}"
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{begin}: {error.strerror}; {_toml_files_near(path)}"]) from error
    if len(content) > MOST_BYTES:
        raise ConfigError([f"{begin}: it has more than {MOST_BYTES:,} bytes; give a TOML file"])
    try:
        return _parse_toml(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError([f"{begin}: not UTF-8 ({error.reason}, byte {error.start})"]) from error
    except ValueError as error:
        raise ConfigError([f"{begin}: not TOML ({error})"]) from error


def _parse_toml(text: str) -> dict[str, Any]:
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


def _toml_files_near(path: str | Path) -> str:
    """Say which TOML files the folder of `path` has, the most similar names first."""
    folder = Path(path).parent
    try:
        if not folder.is_dir():
            return f"the folder {folder} does not exist"
        names = [file.name for file in folder.glob("*.toml")]
    except OSError as error:
        return f"the folder {folder} cannot be read ({error.strerror})"
    names.sort(key=lambda name: (-SequenceMatcher(None, name, Path(path).name).ratio(), name))
    shown = ", ".join(str(folder / name) for name in names[:3])
    return f"give one of {shown}" if shown else f"the folder {folder} has no TOML file"


def parse(table: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build the configuration from a TOML table; raise ConfigError with every mistake."""
    errors: list[str] = []
    merged = _copy(table)
    for override in overrides:
        _apply_override(merged, override, errors)
    config = build(Config, merged, "", errors)
    if errors or config is None:
        raise ConfigError(errors)
    return config


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in table.items()}


def _apply_override(table: dict[str, Any], override: str, errors: list[str]) -> None:
    path, equals, text = override.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not 2 <= len(keys) <= MOST_LEVELS or not all(keys):
        errors.append(
            f"override {shown(override)}: expected section.key=value{section_hint(path.strip())}"
        )
        return
    text = text.strip()
    try:
        parsed = _parse_toml(f"value = {text}")
    except ValueError as error:
        if text.startswith(("'", '"', "[", "{")):
            errors.append(f"override {shown(override)}: the value is not TOML ({error})")
            return
        parsed = {}
    # A shell strips quotes: a word that is not a TOML value is a string.
    value = parsed["value"] if len(parsed) == 1 else text
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            errors.append(
                f"override {shown(override)}: '{'.'.join(keys[: depth + 1])}' is not a table"
            )
            return
    table[keys[-1]] = value

"""Load TOML into the typed configuration, strictly, with all mistakes reported together."""

import tomllib
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lcdist.config.build import ConfigError, build, section_hint
from lcdist.config.schema import Config


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
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        message = f"cannot read configuration {path}: {error.strerror}; {_toml_files_near(path)}"
        raise ConfigError([message]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"cannot read configuration {path}: not UTF-8 ({error})"]) from error
    try:
        return tomllib.loads(text)
    except ValueError as error:
        # Not only TOMLDecodeError: an integer with too many digits is a plain ValueError.
        raise ConfigError([f"cannot read configuration {path}: not TOML ({error})"]) from error


def _toml_files_near(path: str | Path) -> str:
    """Say which TOML files the folder of `path` has, the most similar names first."""
    folder = Path(path).parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist"
    names = [file.name for file in folder.glob("*.toml")]
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
    if not equals or len(keys) < 2 or not all(keys):
        errors.append(
            f"override {override!r}: expected section.key=value{section_hint(path.strip())}"
        )
        return
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError as error:
        if text.startswith(("'", '"', "[", "{")):
            errors.append(f"override {override!r}: the value is not TOML ({error})")
            return
        parsed = {}
    # A shell strips quotes: a word that is not a TOML value is a string.
    value = parsed["value"] if len(parsed) == 1 else text
    for depth, key in enumerate(keys[:-1]):
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            errors.append(f"override {override!r}: '{'.'.join(keys[: depth + 1])}' is not a table")
            return
    table[keys[-1]] = value

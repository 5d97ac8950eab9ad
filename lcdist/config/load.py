"""Load TOML into the typed configuration, strictly, with all mistakes reported together."""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from lcdist.config.build import ConfigError, build
from lcdist.config.overrides import merge_overrides
from lcdist.config.schema import Config
from lcdist.config.toml_text import parse_toml

# A configuration has a few KiB; Python parses about a MiB of TOML a second.
MOST_BYTES = 2**20


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
        return parse_toml(content.decode())
    except UnicodeDecodeError as error:
        raise ConfigError([f"{begin}: not UTF-8 ({error.reason}, byte {error.start})"]) from error
    except ValueError as error:
        raise ConfigError([f"{begin}: not TOML ({error}); correct that line"]) from error


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
    config = build(Config, merge_overrides(table, overrides, errors), "", errors)
    if errors or config is None:
        raise ConfigError(errors)
    return config

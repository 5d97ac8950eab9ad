"""The settings of a run folder: write them, and compare them with those of an earlier start."""

import dataclasses
from pathlib import Path
from typing import Any

from lcdist.config import ConfigError, dump, load
from lcdist.config.schema import Config
from lcdist.rundir.paths import CONFIG_FILE
from lcdist.utils.atomic import write_file

# Keys that may change between the starts of one run; a change of any other key is a new run.
MAY_CHANGE = (
    "attention.impl",
    "parallel.",
    "deepspeed.",
    "train.engine",
    "optim.",
    "lora.lr_ratio",
    "train.steps",
    "train.micro_batch_size",
    "train.recompute",
    "train.offload",
    "train.mlp",
    "train.loss",
    "train.kernels",
    "train.profile",
    "train.deterministic",
    "train.on_bad_step",
    "train.bad_step_limit",
    "checkpoint.every",
    "checkpoint.keep_",
    "checkpoint.asynchronous",
    "checkpoint.verify",
    "checkpoint.resume_from",
    "checkpoint.fallback",
    "log.",
    "evaluate.",
)


def check_same_run(folder: Path, config: Config) -> list[str]:
    """Return the settings that changed since the last start of the run in `folder`.

    Returns:
        One line per changed setting; empty if the folder holds no run yet.

    Raises:
        ValueError: the folder holds another run, with another model, data or sample order.
    """
    file = folder / CONFIG_FILE
    if not file.exists():
        return []
    before, now = flat_settings(read_config(folder)), flat_settings(config)
    changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    forbidden = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if forbidden:
        changes = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in forbidden)
        raise ValueError(
            f"log.folder = '{folder}' holds another run: {changes}. Choose another log.folder (and "
            f"start from this run's weights with checkpoint.load), or restore the settings, or "
            f"{CONFIG_FILE} there"
        )
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]


def read_config(folder: Path) -> Config:
    """Read the configuration in a run folder; raise ConfigError with the file's name."""
    file = folder / CONFIG_FILE
    try:
        return load(file)
    except ConfigError as error:
        # Without its name the mistakes would seem to be those of the file that the user gave.
        named = [line if str(file) in line else f"{file}: {line}" for line in error.errors]
        raise ConfigError(named) from error


def write_config(folder: Path, config: Config) -> None:
    """Write the resolved configuration as TOML that `load` can read."""
    write_file(folder / CONFIG_FILE, dump(config))


def flat_settings(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a configuration by `section.key`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            values |= flat_settings(value, f"{key}.")
        else:
            values[key] = value
    return values

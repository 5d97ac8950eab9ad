"""Load a run's configuration, with the settings that come from the checkpoint it starts from."""

import tomllib
from collections.abc import Sequence
from pathlib import Path

from lcdist.config import ConfigError, parse
from lcdist.config.schema import Config
from lcdist.config.source import Source
from lcdist.config.stages import Stage, load_stages
from lcdist.rundir.paths import CHECKPOINTS, CONFIG_FILE, MANIFEST, STEP_PREFIX, latest_in
from lcdist.rundir.run_config import read_config
from lcdist.utils.json_file import read_object

_HF_CONFIG = "config.json"


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Stage, ...]:
    """Load the stages of a configuration file; `[model]` is completed by `checkpoint.load`.

    Args:
        path: The file.
        overrides: `section.key=value` words.

    Raises:
        ConfigError: With every mistake.
        CheckpointError: If the checkpoint is damaged.
    """
    return load_stages(path, overrides, find_source)


def find_source(folder: str, run_folder: str) -> Source | None:
    """Return the settings of the checkpoint in `folder`; None if there is none.

    A run that was started before goes on without the checkpoint it began from: its own
    configuration takes that one's place.

    Args:
        folder: A checkpoint, a run, or an import.
        run_folder: The folder of the run that starts; may be empty.
    """
    path = Path(folder)
    for place in (path, path / CHECKPOINTS):
        newest = place if place.name.startswith(STEP_PREFIX) else latest_in(place)
        if newest is not None and (newest / MANIFEST).is_file():
            file = newest / MANIFEST
            text = read_object(file, {"config": str})["config"]
            return _source(str(path), parse(tomllib.loads(text)), is_own=False)
    own = Path(run_folder) if run_folder else None
    if own is not None and (own / CONFIG_FILE).is_file():
        return _source(str(own), read_config(own), is_own=True)
    if (path / _HF_CONFIG).is_file():
        raise ConfigError(
            [
                f"{folder} is a Hugging Face folder, not a checkpoint: import it first, with "
                f"'lcdist convert import {folder} NEW_FOLDER', and name the new folder"
            ]
        )
    return None


def _source(name: str, config: Config, is_own: bool) -> Source:
    return Source(name, config.model, config.train.seqlen, is_own)

"""Find the checkpoints that a run goes back to: what it started from, and so on."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lcdist.checkpoint.manifest import Checkpoint, CheckpointError
from lcdist.checkpoint.read import open_checkpoint, saved_config
from lcdist.config.schema import Config
from lcdist.convert.huggingface.custom_attention import inference_layers, is_plain_llama

# Key of an import's manifest: the Hugging Face folder.
IMPORTED_FROM = "imported_from"


def ancestors(config: Config) -> Iterator[Checkpoint]:
    """Yield the checkpoint that a run started from, the one before, and so on while they exist.

    Args:
        config: of the run.
    """
    seen, folder = set[Path](), config.checkpoint.load
    while folder:
        try:
            found = open_checkpoint(Path(folder))
        except CheckpointError:  # deleted since
            return
        yield found
        if found.path in seen:
            return
        seen.add(found.path)
        folder = saved_config(found).checkpoint.load


def base_model(config: Config) -> str | None:
    """Return the Hugging Face folder that a run's adapters belong on; None if there is none.

    It has to be what was imported, in place, and read text as the run does: with another rotation,
    another method or more tokens, an adapter on it would compute something else without an error.
    """
    for checkpoint in ancestors(config):
        folder = checkpoint.manifest.get(IMPORTED_FROM)
        if not isinstance(folder, str):
            continue
        theirs = replace(saved_config(checkpoint).model, init_std=config.model.init_std)
        is_plain = is_plain_llama(inference_layers(config.model, config.attention))
        same = theirs == config.model and is_plain
        return folder if same and Path(folder).is_dir() else None
    return None

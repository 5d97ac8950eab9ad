"""Let another checkpoint mark the tokens that LongPPL scores, before the evaluated one is loaded.

Only one of the two models is in memory at a time. The marker is read with its own settings, on the
mesh and on the text of the evaluation.
"""

from collections.abc import Sequence
from pathlib import Path

from lcdist.checkpoint.manifest import Checkpoint
from lcdist.checkpoint.read import open_checkpoint, saved_config
from lcdist.config.schema import Config
from lcdist.data.datasets.build import held_out_folder
from lcdist.data.meta import META, Meta, read_meta
from lcdist.data.tokenizers.files import open_tokenizer
from lcdist.evaluate.loaded_model import load_model
from lcdist.evaluate.longppl import KeyTokens
from lcdist.evaluate.text import open_text
from lcdist.rundir.paths import CheckpointError

# The name of its units, with their version.
MARKS = "longppl marks 1"
# Settings of the command line that the marker takes too.
_TAKEN = ("parallel.", "checkpoint.")


def has_marker(config: Config) -> bool:
    """Return whether another checkpoint marks tokens of this evaluation."""
    return bool(config.evaluate.marker) and "longppl" in config.evaluate.measure


def open_marker(config: Config) -> Checkpoint:
    """Return the checkpoint `evaluate.marker`; raise CheckpointError that names the setting."""
    try:
        return open_checkpoint(Path(config.evaluate.marker))
    except CheckpointError as error:
        raise CheckpointError(f"evaluate.marker: {error}") from error


def load_marker(
    checkpoint: Checkpoint, config: Config, overrides: Sequence[str], mesh: Sequence[str]
) -> KeyTokens:
    """Load the marker and return what finds key tokens with it.

    Args:
        checkpoint: the evaluated one, whose text is marked.
        config: of the evaluation.
        overrides: of the evaluation.
        mesh: overrides that give the mesh by default.

    Raises:
        ValueError: its tokenizer is another one, or not known; or as `load_model`.
    """
    path = Path(config.evaluate.marker)
    taken = [word for word in overrides if word.lstrip().startswith(_TAKEN)]
    text, meta = open_text(config, checkpoint)
    marker = open_marker(config)
    _check_tokenizer(marker, saved_config(marker), meta, config)
    loaded = load_model(path, taken, mesh)
    loaded.check_vocabulary(meta)
    return KeyTokens(loaded, text, config.evaluate)


def _check_tokenizer(marker: Checkpoint, settings: Config, meta: Meta, config: Config) -> None:
    """Raise ValueError unless the marker reads the same token numbers."""
    own = _fingerprint(marker, settings)
    begin = f"evaluate.marker = '{config.evaluate.marker}'"
    if own is None:
        raise ValueError(
            f"{begin}: its tokenizer is not known, as its folder of tokens is gone; put the folder "
            "back, or choose another marker"
        )
    if own != meta.fingerprint:
        raise ValueError(
            f"{begin} has another tokenizer than the text in {held_out_folder(config.data)}: "
            "choose a marker that was trained on the same tokens, or leave it out: the model then "
            "marks for itself"
        )


def _fingerprint(checkpoint: Checkpoint, config: Config) -> str | None:
    """Return the digest of a checkpoint's tokenizer; None if nothing tells it."""
    if config.data.source == "tokens" and (config.data.path or config.data.mixture):
        folder = held_out_folder(config.data)
        if (folder / META).is_file():
            return read_meta(folder).fingerprint
    # An import keeps the tokenizer beside its checkpoints.
    try:
        return open_tokenizer(checkpoint.path.parent.parent).fingerprint
    except (ValueError, OSError):
        return None

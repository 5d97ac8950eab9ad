"""Names of the files and folders in a run folder."""

import re
from pathlib import Path

CONFIG_FILE = "config.toml"
HEADER_FILE = "run.json"
STATUS_FILE = "status.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = "lock"
CHECKPOINTS = "checkpoints"
# In the folder of a checkpoint: everything that is not a tensor.
MANIFEST = "lcdist.json"
# In the folder of checkpoints: a text file that holds the name of the newest.
LATEST = "latest"
STEP_PREFIX = "step_"
# A checkpoint that a run passed over because a file of it had changed.
DAMAGED_PREFIX = "damaged_"
# A checkpoint that a run went back behind.
LEFT_PREFIX = "left_"
RESTORE_OR_DELETE = (
    f"restore it, or delete the checkpoint's folder and the file '{LATEST}' to use an older"
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which one, why and what to do."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint differs from what was written.

    Args:
        folder: of the checkpoint.
        damage: what is wrong with which file.
    """

    def __init__(self, folder: Path, damage: str) -> None:
        super().__init__(folder, damage)
        self.folder, self.damage = folder, damage

    def __str__(self) -> str:
        return f"{self.folder} is damaged: {self.damage}; {RESTORE_OR_DELETE}"


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint written after `step` steps."""
    return f"{STEP_PREFIX}{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step at which a checkpoint was written, from its folder name."""
    return int(checkpoint.name.removeprefix(STEP_PREFIX))


def latest_in(folder: Path) -> Path | None:
    """Return the newest checkpoint in `folder`, a folder of checkpoints; None if it has none.

    Raises:
        CheckpointError: the file `latest` names no checkpoint, or one that does not exist.
    """
    pointer = folder / LATEST
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(rf"{STEP_PREFIX}[0-9]{{1,20}}", name):
            raise CheckpointError(
                f"{pointer} is damaged: it names no checkpoint; {RESTORE_OR_DELETE}"
            )
        if (folder / name).is_dir():
            return folder / name
        raise CheckpointError(f"{pointer} names {name}, which does not exist; {RESTORE_OR_DELETE}")
    steps = sorted(folder.glob(f"{STEP_PREFIX}*")) if folder.is_dir() else []
    return steps[-1] if steps else None

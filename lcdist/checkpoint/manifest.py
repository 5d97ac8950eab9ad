"""Format of a checkpoint folder: Megatron's torch_dist files and a manifest.

A checkpoint is a folder such as `step_00000020`. Its manifest, `lcdist.json`, holds everything that
is not a tensor: step, sample index, mesh, configuration, and the size of every file. A folder gets
its name only when it is complete. The file `latest` in the parent folder names the newest one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.rundir.paths import LATEST, RESTORE_OR_DELETE, CheckpointError
from lcdist.utils.atomic import write_file

FORMAT = 1
MANIFEST = "lcdist.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. manifest: the content of its `lcdist.json`."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Number of training steps before it was written."""
        return self.manifest["step"]


def write_manifest(folder: Path, step: int, content: Mapping[str, Any]) -> None:
    """Write the manifest of the files in `folder`. content: the keys besides format and sizes."""
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    table = {"format": FORMAT, "step": step, **content, "files": files}
    write_file(folder / MANIFEST, json.dumps(table, indent=1))


def write_latest(checkpoint: Path) -> None:
    """Make the file `latest` name `checkpoint`."""
    write_file(checkpoint.parent / LATEST, checkpoint.name + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and check the size of every file.

    Raises:
        CheckpointError: the manifest is missing, damaged or of another format, or a file is
            missing or has another size.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.get('format')!r}; this version reads "
            f"{FORMAT}"
        )
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder}: file {name} is missing; {RESTORE_OR_DELETE}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{folder}: file {name} has {file.stat().st_size} bytes, not {size}; "
                f"{RESTORE_OR_DELETE}"
            )
    return manifest

"""Format of a checkpoint folder: Megatron's torch_dist files and a manifest.

A checkpoint is a folder such as `step_00000020`. Its manifest, `lcdist.json`, holds everything that
is not a tensor: step, sample index, mesh, configuration, and the size and SHA-256 of every file. A
folder gets its name only when it is complete. The file `latest` in the parent folder names the
newest one.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.rundir.paths import LATEST, MANIFEST, CheckpointError, DamagedCheckpointError
from lcdist.utils.atomic import sync_file, sync_folder, write_file
from lcdist.utils.digests import sha256_of_all
from lcdist.utils.json_file import check_types, read_object

FORMAT = 1
OWN_DIGEST = "sha256_of_manifest"
# Ending of the files of tensors, which torch writes. Other files are small.
TENSOR_SUFFIX = ".distcp"
_TYPES = {
    **{"step": int, "config": str, "dtype": str, "world_size": int},
    **{"loader": dict, "random_states": list, "files": dict[str, int]},
}


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. manifest: the content of its `lcdist.json`."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Number of training steps before it was written."""
        return self.manifest["step"]

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which has those of all files: equal only for equal weights."""
        return self.manifest.get(OWN_DIGEST, _digest_of(self.manifest))


def write_manifest(
    folder: Path, step: int, content: Mapping[str, Any], digests: Mapping[str, str] | None = None
) -> None:
    """Write the manifest of the files in `folder`, and flush files and folder to disk.

    Args:
        folder: of the checkpoint, complete but for the manifest.
        step: number of training steps before it.
        content: the keys besides format, sizes and digests.
        digests: SHA-256 by file name, as far as they are known: other files are read.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    sizes = {path.name: path.stat().st_size for path in files}
    known = digests or {}
    found = {**known, **sha256_of_all(path for path in files if path.name not in known)}
    sha256 = {name: found[name] for name in sizes}
    for path in files:
        sync_file(path)
    table = {"format": FORMAT, "step": step, **content, "files": sizes, "sha256": sha256}
    table[OWN_DIGEST] = _digest_of(table)
    write_file(folder / MANIFEST, json.dumps(table, indent=1))
    sync_folder(folder)


def _digest_of(table: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own digest, whatever its spaces and order."""
    rest = {key: value for key, value in table.items() if key != OWN_DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_latest(checkpoint: Path) -> None:
    """Make the file `latest` name `checkpoint`."""
    write_file(checkpoint.parent / LATEST, checkpoint.name + "\n")


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and check the size of every file.

    Raises:
        CheckpointError: the folder has no manifest, or one of another format.
        DamagedCheckpointError: the manifest is not legible, or a file is missing or has another
            size.
    """
    try:
        manifest = read_object(folder / MANIFEST, {"format": int})
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise DamagedCheckpointError(folder, str(error)) from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.get('format')!r}; this version reads "
            f"{FORMAT}"
        )
    try:
        check_types(manifest, _TYPES, str(folder / MANIFEST))
    except ValueError as error:
        raise DamagedCheckpointError(folder, str(error)) from error
    if manifest.get(OWN_DIGEST, _digest_of(manifest)) != _digest_of(manifest):
        raise DamagedCheckpointError(folder, f"file {MANIFEST} differs from its own sha256")
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise DamagedCheckpointError(folder, f"file {name} is missing")
        if file.stat().st_size != size:
            raise DamagedCheckpointError(
                folder, f"file {name} has {file.stat().st_size} bytes, not {size}"
            )
    return manifest

"""Check what lcdist has written against its digests: checkpoints, token folders, exports."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lcdist.checkpoint.manifest import read_manifest
from lcdist.data.meta import META, read_meta
from lcdist.data.prepare.retention import retention_line
from lcdist.rundir.paths import (
    CHECKPOINTS,
    DAMAGED_PREFIX,
    LEFT_PREFIX,
    MANIFEST,
    STEP_PREFIX,
    DamagedCheckpointError,
)
from lcdist.utils.digests import SUMS, damaged_files, read_sums


@dataclass(frozen=True)
class Checked:
    """A folder that was compared with its digests.

    Attributes:
        folder: the folder.
        kind: "checkpoint", "token folder" or "files", those of its SHA256SUMS.
        files: number of files with a digest.
        nbytes: their bytes.
        damage: what is wrong, one text for each file; empty if all is as written.
        note: what else there is to know about a whole folder; may be empty.
    """

    folder: Path
    kind: str
    files: int
    nbytes: int
    damage: list[str]
    note: str = ""


def check_at_rest(folder: Path) -> Iterator[Checked]:
    """Compare `folder`, or what it holds if it is a run's, with the digests kept there.

    Yields one result for each folder with digests as soon as it is known.

    Raises:
        ValueError: there is nothing with digests.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; give a run, a checkpoint, or a folder made by "
            "'lcdist tokenize' or 'lcdist convert'"
        )
    checked = 0
    for found in _checkpoints(folder):
        checked += 1
        yield _check_checkpoint(found)
    if (folder / META).is_file():
        checked += 1
        yield _check_tokens(folder)
    if (folder / SUMS).is_file():
        checked += 1
        yield _check_files(folder, "files", read_sums(folder))
    if not checked:
        raise ValueError(
            f"{folder} has no {MANIFEST}, {META} or {SUMS}, and no {CHECKPOINTS} folder: give a "
            "checkpoint, a run, or a folder made by 'lcdist tokenize' or 'lcdist convert'"
        )


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that `folder` is or holds, the damaged ones that runs kept too."""
    if (folder / MANIFEST).exists() or folder.name.startswith(STEP_PREFIX):
        return [folder]
    inside = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    prefixes = (STEP_PREFIX, DAMAGED_PREFIX, LEFT_PREFIX)
    return sorted(path for prefix in prefixes for path in inside.glob(f"{prefix}*"))


def _check_checkpoint(folder: Path) -> Checked:
    try:
        manifest = read_manifest(folder)
    except DamagedCheckpointError as error:
        return Checked(folder, "checkpoint", 0, 0, [error.damage])
    return _check_files(folder, "checkpoint", manifest.get("sha256") or {})


def _check_tokens(folder: Path) -> Checked:
    meta = read_meta(folder)
    checked = _check_files(folder, "token folder", meta.sha256 or {})
    return checked if checked.damage else replace(checked, note=retention_line(folder, meta))


def _check_files(folder: Path, kind: str, digests: dict[str, str]) -> Checked:
    damage = damaged_files(folder, digests)
    paths = [folder / name for name in digests]
    nbytes = sum(path.stat().st_size for path in paths if path.is_file())
    return Checked(folder, kind, len(digests), nbytes, damage)

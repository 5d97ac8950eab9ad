"""Build a token folder beside its final path, resumably, and rename it when it is complete.

A killed process leaves the partial folder behind, without meta.json until it is complete. The next
process locks it. It continues if it has the same inputs and settings, and otherwise empties the
folder.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.meta import META, read_meta
from lcdist.utils.atomic import replace_folder
from lcdist.utils.digests import sha256_of_all

_SHARDS, _REMOVED_SHARDS = "shards", "gone"


@dataclass(frozen=True)
class FolderBuild:
    """A token folder that is being built.

    Attributes:
        folder: the partial folder.
        shards: folder for shards in it, named by a digest of their inputs.
    """

    folder: Path
    shards: Path

    def sizes(self) -> dict[str, int]:
        """Return the sizes of the files in bytes, by name."""
        return {path.name: path.stat().st_size for path in self._files()}

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of the files, by name."""
        return sha256_of_all(self._files())

    def _files(self) -> list[Path]:
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return [path for path in files if path.name != META]


def is_complete(folder: Path, digest: str) -> bool:
    """Return whether `folder` is complete with this digest: only the rename was missing."""
    try:
        return (folder / META).is_file() and read_meta(folder).digest == digest
    except ValueError:
        return False


@contextlib.contextmanager
def folder_build(out: Path, key: str, digest: str) -> Iterator[FolderBuild]:
    """Lock a partial folder beside `out` and rename it to `out` at the end.

    On an error the partial folder remains if a shard is complete, so that the next process can
    continue. Otherwise it is removed.

    Args:
        out: final path; an existing folder is replaced.
        key: digest of the inputs of the shards.
        digest: digest in meta.json of the complete folder.

    Raises:
        ValueError: another process is building the folder.
    """
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = _lock_folder(partial, out)
    shards = partial / _SHARDS / key[:16]
    try:
        if not is_complete(partial, digest):
            _reset(partial, shards)
        yield FolderBuild(partial, shards)
        _remove_shards(partial)
        replace_folder(partial, out, out.with_name(f".{out.name}.replaced"))
    except BaseException:
        if not shards.is_dir() or not any(path.suffix == "" for path in shards.iterdir()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _lock_folder(partial: Path, out: Path) -> int:
    """Return a file descriptor that holds an exclusive lock on `partial`."""
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The last holder may have renamed the folder before this process locked it.
        if not partial.exists() or os.fstat(lock).st_ino != partial.stat().st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"{out}: another process is making it; wait for it to end, or give another folder"
        ) from None
    return lock


def _reset(partial: Path, shards: Path) -> None:
    """Remove what an earlier process left, except for shards and tokenizer with the same key."""
    if not shards.is_dir():
        _remove_shards(partial)
        for path in partial.iterdir():
            path.unlink()
    (partial / META).unlink(missing_ok=True)
    # Partial shards stay until the end: a worker that outlived its parent may be writing one.
    shards.mkdir(parents=True, exist_ok=True)


def _remove_shards(partial: Path) -> None:
    """Remove all shards, even while a worker that outlived its parent still writes to them."""
    removed = partial / _REMOVED_SHARDS
    shutil.rmtree(removed, ignore_errors=True)
    if (partial / _SHARDS).is_dir():
        # After the rename no worker can add a shard.
        (partial / _SHARDS).rename(removed)
        shutil.rmtree(removed)

"""A folder that is built beside its place and takes it when it is whole, over several tries.

A killed process leaves it behind, without meta.json until it is whole; the next one, which can lock
it then, goes on if it wants the same, and empties it otherwise.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lcdist.data.meta import META, read_meta

_SHARDS, _GONE = "shards", "gone"


@dataclass(frozen=True)
class FolderBuild:
    """The folder being built, and the folder in it for shards, named by what they are made from."""

    folder: Path
    shards: Path

    def sizes(self) -> dict[str, int]:
        """Bytes of the files, by name."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        return {path.name: path.stat().st_size for path in files if path.name != META}


def is_whole(folder: Path, digest: str) -> bool:
    """Whether all of the folder that `digest` stands for is there: only its name was missing."""
    try:
        return (folder / META).is_file() and read_meta(folder).digest == digest
    except ValueError:
        return False


@contextlib.contextmanager
def folder_build(out: Path, key: str, digest: str) -> Iterator[FolderBuild]:
    """A folder beside `out` that takes its place at the end.

    key: says what its shards are of. digest: of meta.json, where all of it is there already.
    On an error it stays if a shard is done, so that the next try goes on, and is removed
    otherwise. Raises ValueError where another process is building it.
    """
    partial = out.with_name(f".{out.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not partial.exists() or os.fstat(lock).st_ino != partial.stat().st_ino:
            raise BlockingIOError
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"{out}: another process is making it; wait for that one, or give another folder"
        ) from None
    shards = partial / _SHARDS / key[:16]
    try:
        if not is_whole(partial, digest):
            _clear(partial, shards)
        yield FolderBuild(partial, shards)
        _without_shards(partial)
        replaced = out.with_name(f".{out.name}.replaced")
        if out.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        if not shards.is_dir() or not any(path.suffix == "" for path in shards.iterdir()):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _clear(partial: Path, shards: Path) -> None:
    """Take away what an earlier try left, but for its tokenizer and shards if they are ours."""
    if not shards.is_dir():
        _without_shards(partial)
        for old in partial.iterdir():
            old.unlink()
    (partial / META).unlink(missing_ok=True)
    # Half shards stay until the end: a process that outlived its parent may be writing one.
    shards.mkdir(parents=True, exist_ok=True)


def _without_shards(partial: Path) -> None:
    """Take all shards away, also from a process that outlived its parent and still writes there."""
    gone = partial / _GONE
    shutil.rmtree(gone, ignore_errors=True)
    if (partial / _SHARDS).is_dir():
        # Under another name nothing can be added to it any more.
        (partial / _SHARDS).rename(gone)
        shutil.rmtree(gone)

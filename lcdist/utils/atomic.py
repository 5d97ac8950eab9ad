"""Atomic files and folders: each appears under its name when complete, or not at all.

Everything is written beside its final name, flushed to disk with all it holds, and renamed. A
process killed at any moment leaves the previous content in place.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lcdist.utils.errors import naming


def write_file(path: Path, text: str) -> None:
    """Replace the file at `path` by one that holds `text` in UTF-8."""
    temporary = path.with_name(f".{path.name}.part")
    with naming(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextlib.contextmanager
def atomic_folder(out: Path, prefix: str = ".partial-") -> Iterator[Path]:
    """Yield an empty folder beside `out`, and rename it to `out` at the end.

    The folder is removed if the block raises. The leftover of an earlier process that was killed
    is removed first.

    Args:
        out: final path of the folder; must not exist at the end of the block.
        prefix: name prefix of the folder while it is written.
    """
    partial = out.with_name(f"{prefix}{out.name}")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(out.parent)


def replace_folder(complete: Path, out: Path, aside: Path) -> None:
    """Rename the folder `complete` to `out`; remove an existing folder `out`.

    Args:
        complete: finished folder on the same file system.
        out: final path.
        aside: path that an existing `out` gets until it is removed; an existing one is removed.
    """
    sync_tree(complete)
    if out.exists():
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
    complete.rename(out)
    sync_folder(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def check_free(out: Path, needed: int) -> None:
    """Raise ValueError if `out` exists or its file system has fewer than `needed` bytes free."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: choose another folder, or remove it first")
    existing = out.resolve().parent
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"no room for {out}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB free"
        )


def sync_tree(folder: Path) -> None:
    """Flush all files and folders under `folder` to disk, and `folder` itself."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync_file(Path(parent, name))
        sync_folder(Path(parent))


def sync_file(path: Path) -> None:
    """Flush a file to disk that was written and closed before."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the directory entries of `path` to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Where a conversion writes: a folder that is there when all of it is, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_HALF = ".converting-"


def check_free(out: Path, needed: int) -> None:
    """Raise ValueError where `out` exists or its file system has no room for `needed` bytes."""
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out} exists: choose another folder, or remove it first")
    place = out.resolve().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"no room for {out}: {needed / 2**30:.2f} GiB are needed, {free / 2**30:.2f} GiB free"
        )


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that gets its name at the end; left by an error, it is removed.

    What an earlier conversion to `out` left behind when it was killed is removed too.
    """
    half = out.parent / f"{_HALF}{out.name}"
    if half.exists():
        shutil.rmtree(half)
    half.mkdir(parents=True)
    try:
        yield half
        half.rename(out)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    sync(out.parent)


def sync(folder: Path) -> None:
    """Have the file system remember the names in `folder`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

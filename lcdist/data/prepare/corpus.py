"""Which files a corpus is made of, in an order and under names that no machine changes."""

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Read as records, one document each, by the ending of the file's name.
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = (".txt", ".md", ".rst", ".py", *RECORDS)
# Never text, whatever is in them.
_PACKED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z")
_BLOCK = 8 * 2**20


@dataclass(frozen=True)
class Source:
    """Where text comes from: a folder (read recursively, hidden folders left out) or one file.

    suffixes: endings of the files taken from a folder. exclude: names of folders left out.
    max_bytes: keep only so many bytes of files, chosen by a hash of their names (None: all).
    """

    path: str | Path
    suffixes: tuple[str, ...] = SUFFIXES
    exclude: tuple[str, ...] = ()
    max_bytes: int | None = None


@dataclass(frozen=True)
class SourceFile:
    """One file of a source: where it lies, its name relative to the source, its size in bytes."""

    path: Path
    name: str
    size: int

    @property
    def kind(self) -> str:
        """The ending of `RECORDS` that says how documents are found in it, or "" for plain text."""
        return next((ending for ending in RECORDS if self.path.name.endswith(ending)), "")


def standard_library(max_bytes: int | None = None) -> Source:
    """The running interpreter's own Python sources, without its tests and installed packages.

    max_bytes: see `Source`; the whole is about 12 MB.
    """
    return Source(
        path=sysconfig.get_path("stdlib"),
        suffixes=(".py",),
        exclude=("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
        max_bytes=max_bytes,
    )


def share(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on `seed` and `name` alone, the same on every machine."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def list_files(source: Source) -> list[SourceFile]:
    """The files of `source`, sorted by name.

    Raises ValueError where the path is missing, the folder is empty, no file has one of the
    wanted endings, or a file is packed in a way that is not read.
    """
    files = walk(source)[0]
    for file in files:
        if not file.kind and file.path.name.endswith(_PACKED):
            raise ValueError(
                f"{file.path}: is packed in a way that is not read; unpack it, or give text, "
                f"{', '.join(RECORDS)}"
            )
    return files


def walk(source: Source) -> tuple[list[SourceFile], dict[str, int]]:
    """The files of `source`, sorted by name, and how many others it has, by ending."""
    root = Path(source.path)
    if root.is_file():
        return [SourceFile(root, root.name, root.stat().st_size)], {}
    if not root.is_dir():
        raise ValueError(f"{root}: no such file or folder; give a folder of text or a file")
    files, left = [], Counter()
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in source.exclude and name[0] != "."]
        for path in (Path(folder, name) for name in names):
            if path.name.endswith(source.suffixes) and path.is_file():
                name = path.relative_to(root).as_posix()
                files.append(SourceFile(path, name, path.stat().st_size))
            else:
                left[path.suffix] += 1
    if not files and not left:
        raise ValueError(f"{root}: the folder holds no file; put text in it or give another one")
    if not files:
        seen = ", ".join(f"{ending or 'no ending'} ({n})" for ending, n in left.most_common(5))
        raise ValueError(
            f"{root}: none of its files ends in {', '.join(source.suffixes)}; it holds {seen}; "
            "name the endings to take, or give another folder"
        )
    if source.max_bytes is not None:
        files = _bounded(files, source.max_bytes)
    return sorted(files, key=lambda file: file.name), dict(sorted(left.items()))


def _bounded(files: list[SourceFile], max_bytes: int) -> list[SourceFile]:
    kept, total = [], 0
    for file in sorted(files, key=lambda file: share(0, file.name)):
        if total + file.size <= max_bytes:
            kept.append(file)
            total += file.size
    if not kept:
        smallest = min(file.size for file in files)
        raise ValueError(
            f"max_bytes = {max_bytes}: no file is that small; the smallest has {smallest} bytes"
        )
    return kept


def digest_files(
    files: Sequence[SourceFile], read: Callable[[int], None] = lambda size: None
) -> str:
    """sha256 over the names, sizes and contents of `files`, in hex; `read` hears of bytes read."""
    whole = hashlib.sha256()
    for file in files:
        content = hashlib.sha256()
        with open(file.path, "rb") as stream:
            while block := stream.read(_BLOCK):
                content.update(block)
                read(len(block))
        line = f"{file.name}\0{file.size}\0{content.hexdigest()}\n"
        whole.update(line.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()

"""List the files of a corpus, in an order and with names that are the same on every machine."""

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Suffixes of files that hold records, one document each.
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = (".txt", ".md", ".rst", ".py", *RECORDS)
# Suffixes of compressed files, which are never plain text.
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z")
_READ_BYTES = 8 * 2**20

# Called with the number of input bytes processed since the last call.
OnBytes = Callable[[int], None]


def ignore_bytes(size: int) -> None:
    """Report no progress: the default `OnBytes`."""


@dataclass(frozen=True)
class Source:
    """A folder of text, read recursively without hidden folders, or a single file.

    Attributes:
        path: the folder or file.
        suffixes: suffixes of the files to use from a folder.
        exclude: names of folders to leave out.
        max_bytes: upper bound on the bytes of files to use, chosen by a hash of their names. None:
            use all files.
    """

    path: str | Path
    suffixes: tuple[str, ...] = SUFFIXES
    exclude: tuple[str, ...] = ()
    max_bytes: int | None = None


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: its path, its name relative to the source, and its size in bytes."""

    path: Path
    name: str
    size: int

    @property
    def kind(self) -> str:
        """The suffix in `RECORDS` that determines the file's format, or "" for plain text."""
        return next((suffix for suffix in RECORDS if self.path.name.endswith(suffix)), "")


def standard_library(max_bytes: int | None = None) -> Source:
    """Return the Python sources of the running interpreter, without tests and packages.

    Args:
        max_bytes: see `Source`; all files together are about 12 MB.
    """
    return Source(
        path=sysconfig.get_path("stdlib"),
        suffixes=(".py",),
        exclude=("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
        max_bytes=max_bytes,
    )


def hash_fraction(seed: int, name: str) -> float:
    """Return a number in [0, 1) that depends on `seed` and `name` alone."""
    digest = hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def list_files(source: Source) -> list[SourceFile]:
    """Return the files of `source`, sorted by name.

    Raises:
        ValueError: the path is missing, the folder is empty, no file has one of the suffixes, or a
            file has an unsupported compression.
    """
    files, _ = scan_source(source)
    for file in files:
        if not file.kind and file.path.name.endswith(_COMPRESSED):
            raise ValueError(
                f"{file.path}: this kind of compressed file is not supported; decompress it, or "
                f"give text, {', '.join(RECORDS)}"
            )
    return files


def scan_source(source: Source) -> tuple[list[SourceFile], dict[str, int]]:
    """Return the files of `source`, sorted by name, and the number of other files by suffix."""
    root = Path(source.path)
    if root.is_file():
        return [SourceFile(root, root.name, root.stat().st_size)], {}
    if not root.is_dir():
        raise ValueError(f"{root}: no such file or folder; give a folder of text or a file")
    files, other_suffixes = [], Counter()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in source.exclude and n[0] != "."]
        for path in (Path(folder, name) for name in names):
            if path.name.endswith(source.suffixes) and path.is_file():
                name = path.relative_to(root).as_posix()
                files.append(SourceFile(path, name, path.stat().st_size))
            else:
                other_suffixes[path.suffix] += 1
    if not files and not other_suffixes:
        raise ValueError(f"{root}: the folder has no file; put text in it or give another one")
    if not files:
        common = other_suffixes.most_common(5)
        listed = ", ".join(f"{suffix or 'no suffix'} ({n})" for suffix, n in common)
        raise ValueError(
            f"{root}: no file ends in {', '.join(source.suffixes)}; it has {listed}; "
            "give the suffixes to use, or another folder"
        )
    if source.max_bytes is not None:
        files = _select_files(files, source.max_bytes)
    return sorted(files, key=lambda file: file.name), dict(sorted(other_suffixes.items()))


def _select_files(files: list[SourceFile], max_bytes: int) -> list[SourceFile]:
    """Return files of at most `max_bytes` together, in an order drawn from their names."""
    selected, total = [], 0
    for file in sorted(files, key=lambda file: hash_fraction(0, file.name)):
        if total + file.size <= max_bytes:
            selected.append(file)
            total += file.size
    if not selected:
        smallest = min(file.size for file in files)
        raise ValueError(
            f"max_bytes = {max_bytes}: no file is that small; the smallest has {smallest} bytes"
        )
    return selected


def digest_files(files: Sequence[SourceFile], on_bytes: OnBytes = ignore_bytes) -> str:
    """Return the sha256, in hex, over the names, sizes and contents of `files`.

    Args:
        files: the files in order.
        on_bytes: called with the number of bytes after each read.
    """
    corpus_hash = hashlib.sha256()
    for file in files:
        file_hash = hashlib.sha256()
        with open(file.path, "rb") as stream:
            while block := stream.read(_READ_BYTES):
                file_hash.update(block)
                on_bytes(len(block))
        line = f"{file.name}\0{file.size}\0{file_hash.hexdigest()}\n"
        corpus_hash.update(line.encode("utf-8", "surrogateescape"))
    return corpus_hash.hexdigest()

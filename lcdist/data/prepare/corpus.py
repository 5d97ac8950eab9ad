"""List the files of a corpus, in an order and with names that are the same on every machine."""

import hashlib
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Suffixes of files that hold records, one document each.
RECORDS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# Those that may hold conversations.
CONVERSATIONS = RECORDS[:-1]
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
    """A folder of text, read recursively, or a single file.

    Attributes:
        path: the folder or file.
        suffixes: suffixes of the files to use from a folder.
        exclude: names of folders to leave out.
        max_bytes: upper bound on the bytes of files to use, chosen by a hash of their names. None:
            use all files.
        follow_links: whether to read folders behind symbolic links. Files behind links are read.
        hidden: whether to read folders whose names begin with a dot.
    """

    path: str | Path
    suffixes: tuple[str, ...] = SUFFIXES
    exclude: tuple[str, ...] = ()
    max_bytes: int | None = None
    follow_links: bool = False
    hidden: bool = False


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
        path: the file.
        name: path relative to the source.
        size: bytes when it was listed.
        modified: time of its last change when it was listed, in ns since 1970; None: not known.
    """

    path: Path
    name: str
    size: int
    modified: int | None = None

    @classmethod
    def of(cls, path: Path, name: str) -> "SourceFile":
        """Return the file at `path` as it is now."""
        found = path.stat()
        return cls(path, name, found.st_size, found.st_mtime_ns)

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


@dataclass(frozen=True)
class Listing:
    """List the files of a source, and count what is not read.

    Attributes:
        files: those to read, sorted by name.
        left_out: number of all others by reason, such as "suffix .png". A folder that is not
            entered counts once.
        seen: number of all of them: `files` and those left out.
    """

    files: list[SourceFile]
    left_out: dict[str, int]
    seen: int


def scan_source(source: Source) -> Listing:
    """Return the files of `source` to read, and how many others it has.

    Raises:
        ValueError: the path is missing, a folder cannot be listed, no file has one of the suffixes,
            or a file has an unsupported compression.
    """
    root = Path(source.path)
    if root.is_file():
        listing = Listing([SourceFile.of(root, root.name)], {}, 1)
    elif root.is_dir():
        listing = _scan_folder(source, root)
    else:
        raise ValueError(f"{root}: no such file or folder; give a folder of text or a file")
    for file in listing.files:
        if not file.kind and file.path.name.endswith(_COMPRESSED):
            raise ValueError(
                f"{file.path}: this kind of compressed file is not supported; decompress it, or "
                f"give text, {', '.join(RECORDS)}"
            )
    return listing


def _scan_folder(source: Source, root: Path) -> Listing:
    files, left_out, seen = [], Counter[str](), 0
    for path, reason in _walk(source, root):
        seen += 1
        if reason:
            left_out[reason] += 1
        else:
            files.append(SourceFile.of(path, path.relative_to(root).as_posix()))
    if not seen:
        raise ValueError(f"{root}: the folder has no file; put text in it or give another one")
    if not files:
        listed = ", ".join(f"{reason} ({n})" for reason, n in left_out.most_common(5))
        raise ValueError(
            f"{root}: no file ends in {', '.join(source.suffixes)}; it has {listed}; "
            "give the suffixes to use, or another folder"
        )
    if source.max_bytes is not None:
        selected = _select_files(files, source.max_bytes)
        left_out["beyond max_bytes"] = len(files) - len(selected)
        files = selected
    counts = {reason: number for reason, number in sorted(left_out.items()) if number}
    return Listing(sorted(files, key=lambda file: file.name), counts, seen)


def _walk(source: Source, root: Path) -> Iterator[tuple[Path, str]]:
    """Yield every file below `root` with the reason to leave it out, "" if it is to be read.

    A folder that is not entered is yielded as if it were a file.
    """
    # Each folder with those above it: a link to one of them would lead around for ever.
    pending = [(root, frozenset([_identity(root)]))]
    while pending:
        folder, above = pending.pop()
        try:
            with os.scandir(folder) as found:
                entries = [(Path(entry.path), entry.is_symlink()) for entry in found]
        except OSError as error:
            raise ValueError(
                f"{folder}: the folder cannot be listed ({error.strerror}); make it readable, or "
                "move it out of the source"
            ) from error
        for path, is_link in entries:
            if not path.is_dir():
                yield path, _file_reason(path, source.suffixes)
                continue
            own = _identity(path)
            reason = "loop of links" if own in above else _folder_reason(path, is_link, source)
            if reason:
                yield path, reason
            else:
                pending.append((path, above | {own}))


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _folder_reason(path: Path, is_link: bool, source: Source) -> str:
    if path.name in source.exclude:
        return "excluded folder"
    if path.name.startswith(".") and not source.hidden:
        return "hidden folder"
    return "linked folder" if is_link and not source.follow_links else ""


def _file_reason(path: Path, suffixes: tuple[str, ...]) -> str:
    if not path.name.endswith(suffixes):
        return f"suffix {path.suffix}" if path.suffix else "no suffix"
    if not path.exists():
        return "dangling link"
    return "" if path.is_file() else "neither file nor folder"


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


def check_unchanged(file: SourceFile) -> None:
    """Raise ValueError if a file is not what it was when it was listed.

    A change shows in the size or in the time of the last change, which writing always sets.
    """
    remedy = "run the command again when nothing writes to it"
    try:
        found = file.path.stat()
    except FileNotFoundError as error:
        raise ValueError(f"{file.path}: was removed after it was listed; {remedy}") from error
    if found.st_size != file.size:
        raise ValueError(
            f"{file.path}: changed while it was read, from {file.size} to {found.st_size} bytes; "
            f"{remedy}"
        )
    if file.modified is not None and found.st_mtime_ns != file.modified:
        raise ValueError(f"{file.path}: was written to while it was read; {remedy}")


def check_size_read(file: SourceFile, size: int, expected: int) -> None:
    """Raise ValueError if `size` bytes of a file were read and not as many as `expected`."""
    check_unchanged(file)
    if size != expected:
        raise ValueError(
            f"{file.path}: {size} bytes were read where the file system lists {expected}; copy the "
            "file to a disk and read it there"
        )


def digest_files(files: Sequence[SourceFile], on_bytes: OnBytes = ignore_bytes) -> str:
    """Return the sha256, in hex, over the names, sizes and contents of `files`.

    Args:
        files: the files in order.
        on_bytes: called with the number of bytes after each read.

    Raises:
        ValueError: a file changed after it was listed.
    """
    corpus_hash = hashlib.sha256()
    for file in files:
        file_hash, size = hashlib.sha256(), 0
        with open(file.path, "rb") as stream:
            while block := stream.read(_READ_BYTES):
                file_hash.update(block)
                size += len(block)
                on_bytes(len(block))
        check_size_read(file, size, file.size)
        line = f"{file.name}\0{file.size}\0{file_hash.hexdigest()}\n"
        corpus_hash.update(line.encode("utf-8", "surrogateescape"))
    return corpus_hash.hexdigest()

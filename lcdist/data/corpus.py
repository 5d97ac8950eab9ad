"""Documents out of text folders, text files and JSONL, read in parts so that none is too big.

A text file is one document, or several of about a mebibyte where it is longer, cut at line ends;
in JSONL every line is one, its text under the key `text`. Whatever cannot be read is refused or
listed, never lost in silence.
"""

import hashlib
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SUFFIXES = (".txt", ".md", ".rst", ".py", ".jsonl")
PART_BYTES = 2**20
OnError = Literal["refuse", "skip"]


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


@dataclass(frozen=True)
class Part:
    """Bytes [start, stop) of a file: one document of text, or some lines of JSONL."""

    file: SourceFile
    start: int
    stop: int

    @property
    def is_jsonl(self) -> bool:
        """Whether the documents are lines of JSON."""
        return self.file.path.suffix == ".jsonl"


@dataclass(frozen=True)
class Document:
    """One document: a name that does not depend on the machine, and its text."""

    name: str
    text: str


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

    Raises ValueError where the path is missing, the folder is empty, or no file has one of the
    wanted endings.
    """
    root = Path(source.path)
    if root.is_file():
        return [SourceFile(root, root.name, root.stat().st_size)]
    if not root.is_dir():
        raise ValueError(f"{root}: no such file or folder; give a folder of text or a file")
    files, endings = [], Counter()
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in source.exclude and name[0] != "."]
        for path in (Path(folder, name) for name in names):
            endings[path.suffix] += 1
            if path.suffix in source.suffixes and path.is_file():
                name = path.relative_to(root).as_posix()
                files.append(SourceFile(path, name, path.stat().st_size))
    if not endings:
        raise ValueError(f"{root}: the folder holds no file; put text in it or give another one")
    if not files:
        seen = ", ".join(f"{ending or 'no ending'} ({n})" for ending, n in endings.most_common(5))
        raise ValueError(
            f"{root}: none of its files ends in {', '.join(source.suffixes)}; it holds {seen}; "
            "name the endings to take, or give another folder"
        )
    if source.max_bytes is not None:
        files = _bounded(files, source.max_bytes)
    return sorted(files, key=lambda file: file.name)


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


def digest_files(files: Sequence[SourceFile]) -> str:
    """sha256 over the names, sizes and contents of `files`, in hex."""
    whole = hashlib.sha256()
    for file in files:
        with open(file.path, "rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        line = f"{file.name}\0{file.size}\0{content}\n"
        whole.update(line.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def cut(file: SourceFile, cuts: Sequence[int] = ()) -> list[Part]:
    """The parts of a file, each of about `PART_BYTES`, cut at line ends.

    cuts: further byte offsets to cut at, each moved on to the next line end. Text without line
    ends is cut between characters; a line of JSONL is never cut.
    """
    wanted = sorted({*range(PART_BYTES, file.size, PART_BYTES), *cuts})
    jsonl = file.path.suffix == ".jsonl"
    borders = [0]
    with open(file.path, "rb") as stream:
        for offset in wanted:
            if borders[-1] < offset < file.size:
                borders.append(_border(stream, offset, jsonl))
    borders.append(file.size)
    return [Part(file, a, b) for a, b in zip(borders, borders[1:], strict=False) if a < b or not a]


def _border(stream, offset: int, jsonl: bool) -> int:
    stream.seek(offset - 1)
    line = stream.readline(-1 if jsonl else PART_BYTES // 16)
    if jsonl or line.endswith(b"\n"):
        return offset - 1 + len(line)
    stream.seek(offset)
    # A byte 10xxxxxx continues a character of UTF-8, which has at most three of them.
    return offset + next((i for i, byte in enumerate(stream.read(4)) if byte & 0xC0 != 0x80), 0)


def documents(part: Part, on_error: OnError, skipped: list[dict]) -> Iterator[Document]:
    """The documents of a part, in order; empty ones too.

    on_error: "refuse" raises ValueError naming file, line and byte offset at the first one that
    cannot be read; "skip" appends that as {"file", "offset", "reason"} to `skipped` and goes on.
    """
    if on_error not in ("refuse", "skip"):
        raise ValueError(f"on_error = {on_error!r}: must be 'refuse' or 'skip'")
    with open(part.file.path, "rb") as stream:
        stream.seek(part.start)
        data = stream.read(part.stop - part.start)
    # Not splitlines: it also cuts at a bare carriage return, which JSON takes for a space.
    lines = data.split(b"\n") if part.is_jsonl else [data]
    start = part.start
    for line in lines:
        try:
            text = _json_text(line) if part.is_jsonl else line.decode()
        except _Unreadable as error:
            _report(part, start + error.offset, str(error), on_error, skipped)
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 ({error.reason})"
            _report(part, start + error.start, reason, on_error, skipped)
        else:
            if text is not None:
                suffix = f"@{start}" if part.is_jsonl or start else ""
                yield Document(part.file.name + suffix, text)
        start += len(line) + part.is_jsonl


class _Unreadable(ValueError):
    """A line of JSONL without a text; `offset` counts bytes from the line's start."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.offset = offset


def _json_text(line: bytes) -> str | None:
    if not line.strip():
        return None
    decoded = line.decode()
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        offset = len(decoded[: error.pos].encode())
        raise _Unreadable(f"not JSON ({error.msg})", offset) from error
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"JSON that cannot be read ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise _Unreadable('not an object with a string under "text"')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:
        raise _Unreadable(f"its text holds a lone surrogate ({error.reason})") from error
    return record["text"]


def _report(part: Part, offset: int, reason: str, on_error: OnError, skipped: list[dict]) -> None:
    line = ""
    if part.is_jsonl:
        with open(part.file.path, "rb") as stream:
            number = 1 + sum(chunk.count(b"\n") for chunk in _chunks(stream, offset))
        line = f", line {number}"
    if on_error == "refuse":
        raise ValueError(
            f"{part.file.path}{line}, byte {offset}: {reason}; mend the file, take it out, or "
            'skip such documents with on_error = "skip"'
        )
    skipped.append({"file": part.file.name, "offset": offset, "reason": reason + line})


def _chunks(stream, size: int) -> Iterator[bytes]:
    while size and (chunk := stream.read(min(size, PART_BYTES))):
        size -= len(chunk)
        yield chunk

"""Documents out of files, read in parts so that none is too big: text, JSONL and parquet.

A text file is one document, or several of about a mebibyte where it is longer, cut at line ends;
in JSONL every line is one, in parquet every row. Whatever cannot be read is refused or listed,
never lost in silence.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lcdist.data.prepare.corpus import SourceFile
from lcdist.data.prepare.readers import (
    Text,
    Unreadable,
    json_lines,
    packed_lines,
    parquet_groups,
    parquet_rows,
)

PART_BYTES = 2**20
OnError = Literal["refuse", "skip"]


@dataclass(frozen=True)
class FileChunk:
    """Some of a file: one document of text, or some lines of JSONL or rows of parquet.

    start, stop: bytes of the file; all of it where it is packed; rows of parquet. size: bytes of
    the file that it stands for. group: row group of parquet.
    """

    file: SourceFile
    start: int
    stop: int
    size: int
    group: int = 0


@dataclass(frozen=True)
class Document:
    """One document: a name that does not depend on the machine, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read: what to do with one that cannot be, and where records have text."""

    on_error: OnError
    field: str = "text"

    def __post_init__(self) -> None:
        if self.on_error not in ("refuse", "skip"):
            raise ValueError(f"on_error = {self.on_error!r}: must be 'refuse' or 'skip'")


@dataclass
class SkipCounts:
    """What came beside documents: what could not be read, and how many line ends there were.

    skipped: each as {"file", "offset" (bytes), "reason"}, with "line" or "row", from 1, where there
    are such. A line of a file that is read in parts counts from the part's start until
    `number_lines` has put the lines before it on top.
    """

    skipped: list[dict] = field(default_factory=list)
    lines: int = 0


def cut(file: SourceFile, cuts: Sequence[int] = (), part_bytes: int = 0) -> list[FileChunk]:
    """The parts of a file, each of about `part_bytes` (0: `PART_BYTES`), cut at line ends.

    cuts: further byte offsets to cut at, each moved on to the next line end. Text without line
    ends is cut between characters; a line of JSONL is never cut. A packed file is one part, since
    it can only be read from its start; a row group of parquet is one. Raises ValueError where the
    library that reads parquet is not installed.
    """
    if file.kind == ".parquet":
        return [FileChunk(file, *group) for group in parquet_groups(file)]
    if file.kind in (".jsonl.gz", ".jsonl.zst"):
        return [FileChunk(file, 0, file.size, file.size)]
    size = PART_BYTES if file.kind or not part_bytes else part_bytes
    wanted = sorted({*range(size, file.size, size), *cuts})
    borders = [0]
    with open(file.path, "rb") as stream:
        for offset in wanted:
            if borders[-1] < offset < file.size:
                borders.append(_border(stream, offset, file.kind == ".jsonl"))
    borders.append(file.size)
    pairs = zip(borders, borders[1:], strict=False)
    return [FileChunk(file, a, b, b - a) for a, b in pairs if a < b or not a]


def _border(stream, offset: int, jsonl: bool) -> int:
    stream.seek(offset - 1)
    line = stream.readline(-1 if jsonl else PART_BYTES // 16)
    if jsonl or line.endswith(b"\n"):
        return offset - 1 + len(line)
    stream.seek(offset)
    # A byte 10xxxxxx continues a character of UTF-8, which has at most three of them.
    return offset + next((i for i, byte in enumerate(stream.read(4)) if byte & 0xC0 != 0x80), 0)


def documents(
    part: FileChunk,
    how: ReadOptions,
    tally: SkipCounts,
    read: Callable[[int], None] = lambda size: None,
) -> Iterator[Document]:
    """The documents of a part, in order; empty ones too.

    How "refuse" raises ValueError naming file, line and byte offset at the first one that cannot
    be read; "skip" adds it to `tally` and goes on. read: hears of bytes read, as they are.
    """
    for found in _texts(part, how.field, tally, read):
        if isinstance(found, Text):
            yield Document(part.file.name + found.suffix, found.text)
        elif how.on_error == "refuse":
            place = _place(part, found)
            raise ValueError(
                f"{part.file.path}{place}: {found.reason}; mend the file, take it out, or "
                'skip such documents with on_error = "skip" (--on-error skip)'
            )
        else:
            number = {found.unit: found.number} if found.unit else {}
            entry = {"file": part.file.name, "offset": found.offset} | number
            tally.skipped.append(entry | {"reason": found.reason})


def _texts(
    part: FileChunk, name: str, tally: SkipCounts, read: Callable[[int], None]
) -> Iterator[Text | Unreadable]:
    kind = part.file.kind
    if kind == ".parquet":
        yield from parquet_rows(part.file.path, (part.start, part.stop), part.group, name)
        read(part.size)
    elif kind in (".jsonl.gz", ".jsonl.zst"):
        yield from packed_lines(part.file.path, kind, name, read)
    else:
        with open(part.file.path, "rb") as stream:
            stream.seek(part.start)
            data = stream.read(part.stop - part.start)
        if kind:
            tally.lines += data.count(b"\n")
            # Not splitlines: it also cuts at a bare carriage return, which JSON takes for a space.
            yield from json_lines(data.split(b"\n"), part.start, name)
        else:
            yield _whole(data, part.start)
        read(part.size)


def _whole(data: bytes, start: int) -> Text | Unreadable:
    try:
        return Text(f"@{start}" if start else "", data.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 ({error.reason})", start + error.start)


def number_lines(skipped: list[dict], before: int) -> list[dict]:
    """The entries of a part of JSONL with lines counted from the file's start, `before` it."""
    return [e | {"line": e["line"] + before} if "line" in e else e for e in skipped]


def _place(part: FileChunk, found: Unreadable) -> str:
    number = found.number
    if part.file.kind == ".jsonl":
        number += _lines_before(part.file.path, part.start)
    if found.unit == "row":
        return f", row {number}" if number else ""
    return (f", line {number}" if found.unit else "") + f", byte {found.offset}"


def _lines_before(path: Path, size: int) -> int:
    lines = 0
    with open(path, "rb") as stream:
        while size and (chunk := stream.read(min(size, PART_BYTES))):
            size -= len(chunk)
            lines += chunk.count(b"\n")
    return lines

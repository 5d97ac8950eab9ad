"""Split files into chunks of bounded size and read the documents of a chunk.

A text file is one document, or several of about a mebibyte if it is longer, cut at line ends. In
JSONL every line is a document, in parquet every row. An unreadable document raises an error or is
listed, and is never dropped silently.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lcdist.data.prepare.conversations import ChatTemplate
from lcdist.data.prepare.corpus import (
    OnBytes,
    SourceFile,
    check_size_read,
    check_unchanged,
    ignore_bytes,
)
from lcdist.data.prepare.readers import (
    Document,
    TakeText,
    Unreadable,
    compressed_json_lines,
    json_lines,
    parquet_row_groups,
    parquet_rows,
    text_under,
)

CHUNK_BYTES = 2**20
OnError = Literal["refuse", "skip"]


@dataclass(frozen=True)
class FileChunk:
    """A part of a file: one text document, some lines of JSONL or some rows of parquet.

    Attributes:
        file: the file.
        start, stop: byte range; the whole file if it is compressed; for parquet a range of rows.
        size: number of bytes of the file that the chunk represents.
        group: row group of parquet.
    """

    file: SourceFile
    start: int
    stop: int
    size: int
    group: int = 0


@dataclass(frozen=True)
class ReadOptions:
    """Options for reading documents.

    Attributes:
        on_error: "refuse" raises at an unreadable document, "skip" lists it and continues.
        field: key or column that holds the text of a record.
        chat: reads conversations; None: records hold text.

    Raises:
        ValueError: `on_error` is unknown.
    """

    on_error: OnError
    field: str = "text"
    chat: ChatTemplate | None = None

    @property
    def take(self) -> TakeText:
        """Return what takes the text of a record."""
        return text_under(self.field) if self.chat is None else self.chat.read

    def __post_init__(self) -> None:
        if self.on_error not in ("refuse", "skip"):
            raise ValueError(f"on_error = {self.on_error!r}: must be 'refuse' or 'skip'")


@dataclass
class SkipCounts:
    """Skipped documents and line ends of a chunk, filled in while it is read.

    Attributes:
        skipped: each as {"file", "offset" (bytes), "reason"}, with "line" or "row" from 1 if there
            is one. In a file of several chunks, lines count from the start of the chunk until
            `shift_lines` adds the lines before it.
        lines: number of line ends.
    """

    skipped: list[dict] = field(default_factory=list)
    lines: int = 0


def split_file(
    file: SourceFile, boundaries: Sequence[int] = (), chunk_bytes: int = 0
) -> list[FileChunk]:
    """Split a file into chunks at line ends.

    Text without line ends is split between characters; a line of JSONL is never split. A compressed
    file is one chunk, because it can only be read from its start. In parquet, every row group is
    one chunk.

    Args:
        file: the file.
        boundaries: additional byte offsets to split at, each moved to the next line end.
        chunk_bytes: approximate size of a chunk of text; 0 for `CHUNK_BYTES`.

    Raises:
        ValueError: the file is parquet and pyarrow is not installed.
    """
    if file.kind == ".parquet":
        return [FileChunk(file, *row_group) for row_group in parquet_row_groups(file)]
    if file.kind in (".jsonl.gz", ".jsonl.zst"):
        return [FileChunk(file, 0, file.size, file.size)]
    size = CHUNK_BYTES if file.kind or not chunk_bytes else chunk_bytes
    wanted = sorted({*range(size, file.size, size), *boundaries})
    offsets = [0]
    with open(file.path, "rb") as stream:
        for offset in wanted:
            if offsets[-1] < offset < file.size:
                offsets.append(_next_boundary(stream, offset, file.kind == ".jsonl"))
    offsets.append(file.size)
    pairs = zip(offsets, offsets[1:], strict=False)
    return [FileChunk(file, a, b, b - a) for a, b in pairs if a < b or not a]


def _next_boundary(stream, offset: int, jsonl: bool) -> int:
    """Return the first line end, or character border of long lines of text, from `offset` on."""
    stream.seek(offset - 1)
    line = stream.readline(-1 if jsonl else CHUNK_BYTES // 16)
    if jsonl or line.endswith(b"\n"):
        return offset - 1 + len(line)
    stream.seek(offset)
    # A byte 10xxxxxx continues a UTF-8 character, which has at most three such bytes.
    return offset + next((i for i, byte in enumerate(stream.read(4)) if byte & 0xC0 != 0x80), 0)


def read_documents(
    chunk: FileChunk,
    options: ReadOptions,
    skip_counts: SkipCounts,
    on_bytes: OnBytes = ignore_bytes,
) -> Iterator[Document]:
    """Yield the documents of a chunk in order, empty documents included.

    Args:
        chunk: part of a file.
        options: how to read records and treat errors.
        skip_counts: receives skipped documents and line ends.
        on_bytes: called with the number of bytes after each read.

    Raises:
        ValueError: a document is unreadable and options.on_error is "refuse". The message names
            file, line and byte offset. Or the file changed after it was listed.
    """
    for record in _read_records(chunk, options, skip_counts, on_bytes):
        if isinstance(record, Document):
            yield replace(record, name=chunk.file.name + record.name)
            continue
        # A file that changes under the reader is not an unreadable document.
        check_unchanged(chunk.file)
        if options.on_error == "refuse":
            place = _location(chunk, record)
            raise ValueError(
                f"{chunk.file.path}{place}: {record.reason}; correct or remove the file, or skip "
                'such documents with on_error = "skip" (--on-error skip)'
            )
        else:
            number = {record.unit: record.number} if record.unit else {}
            entry = {"file": chunk.file.name, "offset": record.offset} | number
            skip_counts.skipped.append(entry | {"reason": record.reason})


def _read_records(
    chunk: FileChunk, options: ReadOptions, skip_counts: SkipCounts, on_bytes: OnBytes
) -> Iterator[Document | Unreadable]:
    kind = chunk.file.kind
    if kind == ".parquet":
        rows = (chunk.start, chunk.stop)
        yield from parquet_rows(chunk.file.path, rows, chunk.group, options.field)
        check_unchanged(chunk.file)
        on_bytes(chunk.size)
    elif kind in (".jsonl.gz", ".jsonl.zst"):
        yield from compressed_json_lines(chunk.file.path, kind, options.take, on_bytes)
        check_unchanged(chunk.file)
    else:
        with open(chunk.file.path, "rb") as stream:
            stream.seek(chunk.start)
            data = stream.read(chunk.stop - chunk.start)
        check_size_read(chunk.file, len(data), chunk.stop - chunk.start)
        if kind:
            skip_counts.lines += data.count(b"\n")
            # Not splitlines: it also splits at a bare carriage return, which is a space in JSON.
            yield from json_lines(data.split(b"\n"), chunk.start, options.take)
        else:
            yield _decode_text(data, chunk.start)
        on_bytes(chunk.size)


def _decode_text(data: bytes, start: int) -> Document | Unreadable:
    try:
        return Document(f"@{start}" if start else "", data.decode())
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 ({error.reason})", start + error.start)


def shift_lines(skipped: list[dict], lines_before: int) -> list[dict]:
    """Return the skipped entries of a JSONL chunk with lines counted from the file's start.

    Args:
        skipped: entries of `SkipCounts.skipped`.
        lines_before: lines of the file before the chunk.
    """
    return [e | {"line": e["line"] + lines_before} if "line" in e else e for e in skipped]


def _location(chunk: FileChunk, record: Unreadable) -> str:
    """Return the line or row and the byte offset of an unreadable record, for a message."""
    number = record.number
    if chunk.file.kind == ".jsonl":
        number += _count_lines(chunk.file.path, chunk.start)
    if record.unit == "row":
        return f", row {number}" if number else ""
    return (f", line {number}" if record.unit else "") + f", byte {record.offset}"


def _count_lines(path: Path, size: int) -> int:
    """Return the number of line ends in the first `size` bytes of a file."""
    lines = 0
    with open(path, "rb") as stream:
        while size and (data := stream.read(min(size, CHUNK_BYTES))):
            size -= len(data)
            lines += data.count(b"\n")
    return lines

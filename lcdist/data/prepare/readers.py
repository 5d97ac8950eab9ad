"""Read the texts of records: lines of JSON, compressed or not, and rows of parquet.

Each reader yields texts and unreadable records in order. After an unreadable record it continues as
long as the file allows.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.data.prepare.corpus import OnBytes, SourceFile

# Parquet rows decoded at once; a row group may have a million.
_BATCH_ROWS = 64
# Bytes of a compressed file between two progress reports.
_PROGRESS_BYTES = 2**20


# Places [start, stop) of a conversation's answers in its text, in characters.
Answers = tuple[tuple[int, int], ...]
# Takes the text of a record, and the places of its answers if it is a conversation; raises
# `RecordError`.
TakeText = Callable[[Mapping[str, Any]], tuple[str, Answers | None]]


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        name: its place in its file; `read_documents` puts the file's name before it. It is the same
            on every machine.
        text: what is tokenized.
        answers: places of a conversation's answers in its text; None: not a conversation.
    """

    name: str
    text: str
    answers: Answers | None = None


@dataclass(frozen=True)
class Unreadable:
    """A record without text.

    Attributes:
        reason: why there is no text.
        offset: position in bytes.
        unit: "line", "row" or "".
        number: line or row, from 1.
    """

    reason: str
    offset: int
    unit: str = ""
    number: int = 0


class RecordError(ValueError):
    """A record has no text; `offset` counts bytes from the record's start."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.offset = offset


def json_lines(
    lines: Iterable[bytes], start: int, take: TakeText, newline: int = 1
) -> Iterator[Document | Unreadable]:
    """Yield the text of each line; skip lines of white space.

    Args:
        lines: the lines in order.
        start: byte offset of the first line.
        take: takes the text of a record.
        newline: bytes between two lines that are not part of them.
    """
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                text, answers = take(_json_object(line))
                yield Document(f"@{start}", _check_surrogates(text), answers)
        except RecordError as error:
            yield Unreadable(str(error), start + error.offset, "line", number)
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 ({error.reason})"
            yield Unreadable(reason, start + error.start, "line", number)
        start += len(line) + newline


def text_under(field_name: str) -> TakeText:
    """Return the function that takes the string under a key of a record."""

    def take(record: Mapping[str, Any]) -> tuple[str, None]:
        if not isinstance(record.get(field_name), str):
            keys = f"; it has {', '.join(list(record)[:8])}" if record else ""
            hint = "; conversations need --conversations" if "messages" in record else ""
            raise RecordError(f'not an object with a string under "{field_name}"{keys}{hint}')
        return record[field_name], None

    return take


def _json_object(line: bytes) -> dict[str, Any]:
    decoded = line.decode()
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        offset = len(decoded[: error.pos].encode())
        raise RecordError(f"not JSON ({error.msg})", offset) from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"JSON that cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise RecordError("not an object")
    return record


def _check_surrogates(text: str) -> str:
    """Return `text`; raise RecordError if it contains a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"its text contains a lone surrogate ({error.reason})") from error
    return text


def compressed_json_lines(
    path: Path, kind: str, take: TakeText, on_bytes: OnBytes
) -> Iterator[Document | Unreadable]:
    """Yield the texts of a .jsonl.gz or .jsonl.zst file.

    Offsets and lines are those of the decompressed text. A truncated or damaged file ends with an
    `Unreadable` that says so.

    Args:
        path: the file.
        kind: ".jsonl.gz" or ".jsonl.zst".
        take: takes the text of a record.
        on_bytes: called with the number of compressed bytes after about each mebibyte.
    """
    offset = reported = 0
    with open(path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if kind == ".jsonl.gz" else _zstd(path, raw)
        number = 0
        while True:
            try:
                line = stream.readline()
            except (EOFError, OSError, zlib.error) as error:
                reason = f"damaged or truncated ({error}); the rest of the file is lost"
                yield Unreadable(reason, offset, "line", number + 1)
                break
            if not line:
                break
            number += 1
            for record in json_lines([line], offset, take, newline=0):
                if isinstance(record, Unreadable):
                    record = Unreadable(record.reason, record.offset, "line", number)
                yield record
            offset += len(line)
            if raw.tell() - reported >= _PROGRESS_BYTES:
                on_bytes(raw.tell() - reported)
                reported = raw.tell()
    on_bytes(path.stat().st_size - reported)


def _zstd(path: Path, raw: Any) -> Any:
    arrow = _import_pyarrow(path)
    return _LineReader(arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd"))


class _LineReader:
    """Add `readline` to a stream that has only `read`."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._buffer = stream, b""

    def readline(self) -> bytes:
        """Return the bytes up to and including the next newline, or the rest of the stream."""
        pieces = [self._buffer]
        while b"\n" not in pieces[-1]:
            more = self._stream.read(2**18)
            if not more:
                break
            pieces.append(more)
        data = b"".join(pieces)
        end = data.find(b"\n") + 1 or len(data)
        line, self._buffer = data[:end], data[end:]
        return line


def parquet_row_groups(file: SourceFile) -> list[tuple[int, int, int, int]]:
    """Return (first row, last row + 1, bytes, number) of every row group.

    A file that is not parquet gets one group without rows; reading that group reports the error.

    Raises:
        ValueError: pyarrow is not installed.
    """
    arrow = _import_pyarrow(file.path)
    try:
        with arrow.parquet.ParquetFile(file.path) as opened:
            meta = opened.metadata
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    except (arrow.ArrowException, OSError):
        return [(0, 0, file.size, 0)]
    groups, first, previous_end = [], 0, 0
    for number, count in enumerate(rows):
        # The file's bytes are divided in proportion to the uncompressed sizes of the groups.
        end = file.size * sum(sizes[: number + 1]) // max(1, sum(sizes))
        groups.append((first, first + count, end - previous_end, number))
        first, previous_end = first + count, end
    return groups or [(0, 0, file.size, 0)]


def parquet_rows(
    path: Path, rows: tuple[int, int], group: int, field_name: str
) -> Iterator[Document | Unreadable]:
    """Yield the strings of one column in a row group, decoding a few rows at a time.

    Args:
        path: the file.
        rows: first row and last row + 1 of the row group.
        group: number of the row group.
        field_name: name of the column.
    """
    arrow = _import_pyarrow(path)
    row = rows[0]
    try:
        with arrow.parquet.ParquetFile(path, pre_buffer=False) as opened:
            problem = _column_problem(arrow, opened.schema_arrow, field_name)
            if problem:
                # It concerns the whole file, so only the first group reports it.
                if not group:
                    yield Unreadable(problem, 0, "row", 0)
                return
            if not opened.metadata.num_row_groups:
                return
            for batch in opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[field_name]):
                for value in batch.column(0):
                    row += 1
                    yield _cell_text(value, row)
    except (arrow.ArrowException, OSError) as error:
        lost = f"rows {row + 1} to {rows[1]} are lost" if rows[1] else "the whole file is lost"
        yield Unreadable(f"not parquet, or damaged ({error}); {lost}", 0, "row", row + 1)


def _column_problem(arrow: Any, schema: Any, field_name: str) -> str:
    """Return why a column has no text: it is missing or of another type. "" if it has text."""
    if field_name not in schema.names:
        return f'no column "{field_name}"; it has {", ".join(schema.names[:8])}'
    column_type = schema.field(field_name).type
    is_dictionary = arrow.types.is_dictionary(column_type)
    value_type = column_type.value_type if is_dictionary else column_type
    # Older versions of pyarrow lack is_string_view.
    tests = ("is_string", "is_large_string", "is_string_view")
    if not any(getattr(arrow.types, test, lambda _: False)(value_type) for test in tests):
        return f'column "{field_name}" holds {column_type}, not text'
    return ""


def _cell_text(value: Any, row: int) -> Document | Unreadable:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 ({error.reason})", 0, "row", row)
    if text is None:
        return Unreadable("no text (null)", 0, "row", row)
    return Document(f"@{row}", text)


def _import_pyarrow(path: Path) -> Any:
    """Return pyarrow; raise ValueError with the remedy if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: reading it needs pyarrow, which is not installed: "
            "pip install 'lcdist[parquet]'"
        ) from error
    return pyarrow

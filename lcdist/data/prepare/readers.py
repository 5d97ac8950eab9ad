"""Records to texts: lines of JSON, packed or not, and rows of parquet.

Each reader yields, in order, the texts and what could not be read, and goes on after the latter as
long as the file lets it.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcdist.data.prepare.corpus import SourceFile

# Rows decoded at once: a row group may have a million.
_ROWS = 64
# Bytes of a packed file between two words about progress.
_TOLD = 2**20


@dataclass(frozen=True)
class Text:
    """A document's text, and what its name has after the file's."""

    suffix: str
    text: str


@dataclass(frozen=True)
class Unreadable:
    """Why there is no text at byte `offset`, and the line or row (`unit`) it has, from 1."""

    reason: str
    offset: int
    unit: str = ""
    number: int = 0


class _Bad(ValueError):
    """A record without a text; `offset` counts bytes from its start."""

    def __init__(self, reason: str, offset: int = 0) -> None:
        super().__init__(reason)
        self.offset = offset


def json_lines(
    lines: Iterable[bytes], start: int, name: str, newline: int = 1
) -> Iterator[Text | Unreadable]:
    """The strings under `name`, one a line; lines of white space have none.

    start: the offset of the first line. newline: bytes between lines that are not part of them.
    """
    for number, line in enumerate(lines, 1):
        try:
            text = _json_text(line, name)
        except _Bad as error:
            yield Unreadable(str(error), start + error.offset, "line", number)
        except UnicodeDecodeError as error:
            reason = f"not UTF-8 ({error.reason})"
            yield Unreadable(reason, start + error.start, "line", number)
        else:
            if text is not None:
                yield Text(f"@{start}", text)
        start += len(line) + newline


def _json_text(line: bytes, name: str) -> str | None:
    if not line.strip():
        return None
    decoded = line.decode()
    try:
        record = json.loads(decoded)
    except json.JSONDecodeError as error:
        offset = len(decoded[: error.pos].encode())
        raise _Bad(f"not JSON ({error.msg})", offset) from error
    except (ValueError, RecursionError) as error:
        raise _Bad(f"JSON that cannot be read ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get(name), str):
        keys = f"; it has {', '.join(list(record)[:8])}" if isinstance(record, dict) else ""
        raise _Bad(f'not an object with a string under "{name}"{keys}')
    return _checked(record[name])


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Bad(f"its text holds a lone surrogate ({error.reason})") from error
    return text


def packed_lines(
    path: Path, kind: str, name: str, read: Callable[[int], None]
) -> Iterator[Text | Unreadable]:
    """The texts of a .jsonl.gz or .jsonl.zst; offsets and lines are those of the unpacked text.

    A file that breaks off, or is damaged, ends there with an `Unreadable` that says so.
    """
    at = done = 0
    with open(path, "rb") as raw:
        stream = gzip.GzipFile(fileobj=raw) if kind == ".jsonl.gz" else _zstd(path, raw)
        number = 0
        while True:
            try:
                line = stream.readline()
            except (EOFError, OSError, zlib.error) as error:
                reason = f"damaged or cut off ({error}); what follows in the file is lost"
                yield Unreadable(reason, at, "line", number + 1)
                break
            if not line:
                break
            number += 1
            for found in json_lines([line], at, name, newline=0):
                if isinstance(found, Unreadable):
                    found = Unreadable(found.reason, found.offset, "line", number)
                yield found
            at += len(line)
            if raw.tell() - done >= _TOLD:
                read(raw.tell() - done)
                done = raw.tell()
    read(path.stat().st_size - done)


def _zstd(path: Path, raw: Any) -> Any:
    arrow = _arrow(path)
    return _Lines(arrow.CompressedInputStream(arrow.PythonFile(raw, "r"), "zstd"))


class _Lines:
    """readline over a stream that has none."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._held = stream, b""

    def readline(self) -> bytes:
        """Up to and with the next newline, or what remains."""
        pieces = [self._held]
        while b"\n" not in pieces[-1]:
            more = self._stream.read(2**18)
            if not more:
                break
            pieces.append(more)
        whole = b"".join(pieces)
        end = whole.find(b"\n") + 1 or len(whole)
        line, self._held = whole[:end], whole[end:]
        return line


def parquet_groups(file: SourceFile) -> list[tuple[int, int, int, int]]:
    """(first row, last row + 1, bytes, number) of every row group.

    A file that is not parquet has one group without rows, so that reading it tells. Raises
    ValueError where pyarrow is not installed.
    """
    arrow = _arrow(file.path)
    try:
        with arrow.parquet.ParquetFile(file.path) as opened:
            meta = opened.metadata
            rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
            held = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    except (arrow.ArrowException, OSError):
        return [(0, 0, file.size, 0)]
    groups, first, told = [], 0, 0
    for number, count in enumerate(rows):
        share = file.size * sum(held[: number + 1]) // max(1, sum(held))
        groups.append((first, first + count, share - told, number))
        first, told = first + count, share
    return groups or [(0, 0, file.size, 0)]


def parquet_rows(
    path: Path, rows: tuple[int, int], group: int, name: str
) -> Iterator[Text | Unreadable]:
    """The strings of column `name` in a row group whose rows are `rows`, a few rows at a time."""
    arrow = _arrow(path)
    row = rows[0]
    try:
        with arrow.parquet.ParquetFile(path, pre_buffer=False) as opened:
            wrong = _no_text(arrow, opened.schema_arrow, name)
            if wrong:
                # Of the whole file, and so said once.
                if not group:
                    yield Unreadable(wrong, 0, "row", 0)
                return
            if not opened.metadata.num_row_groups:
                return
            for batch in opened.iter_batches(_ROWS, row_groups=[group], columns=[name]):
                for value in batch.column(0):
                    row += 1
                    yield _cell(value, row)
    except (arrow.ArrowException, OSError) as error:
        lost = f"rows {row + 1} to {rows[1]} are lost" if rows[1] else "all of it is lost"
        yield Unreadable(f"not parquet, or damaged ({error}); {lost}", 0, "row", row + 1)


def _no_text(arrow: Any, schema: Any, name: str) -> str:
    if name not in schema.names:
        return f'no column "{name}"; it has {", ".join(schema.names[:8])}'
    kind = schema.field(name).type
    value = kind.value_type if arrow.types.is_dictionary(kind) else kind
    text = ("is_string", "is_large_string", "is_string_view")
    if not any(getattr(arrow.types, test, lambda _: False)(value) for test in text):
        return f'column "{name}" holds {kind}, not text'
    return ""


def _cell(value: Any, row: int) -> Text | Unreadable:
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 ({error.reason})", 0, "row", row)
    return Unreadable("no text (null)", 0, "row", row) if text is None else Text(f"@{row}", text)


def _arrow(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{path}: reading it needs pyarrow, which is not installed: "
            "pip install 'lcdist[parquet]'"
        ) from error
    return pyarrow

"""Keep what finished units measured in a file, so that an evaluation goes on where it ended.

The first line says what was asked: the checkpoint, the settings, the text, the versions. Every
other line is one unit. A line is written with one system call, flushed to disk, and ends with a
checksum. A last line that was cut short is dropped. The file appears with the first unit.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from lcdist.utils.checked_lines import ChecksumError, with_checksum, without_checksum
from lcdist.utils.errors import naming, shortened

FORMAT = 1
SUFFIX = ".units.jsonl"
AGAIN = "delete it, or add --overwrite to measure everything again"
_SHOWN = 3


class UnitFile:
    """The file of finished units of one evaluation; only rank 0 opens it.

    Args:
        path: of the file.
        question: what is measured: JSON values by name, without the parts.
        overwrite: start again, whatever the file holds.

    Raises:
        ValueError: the file belongs to another question and holds units, is damaged, or is in use
            by another process.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, question: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path, self._question = path, json.loads(json.dumps(question, default=str))
        self.measured: dict[tuple[str, str], dict[str, Any]] = {}
        self._handle: int | None = None
        self._is_begun = False
        if not path.exists():
            return
        with naming(path):
            self._handle = os.open(path, os.O_RDWR | os.O_APPEND)
        try:
            self._lock()
            self._read(overwrite)
        except BaseException:
            self.close()
            raise

    def add(self, part: str, key: str, measured: Mapping[str, Any]) -> None:
        """Keep what a unit measured."""
        with naming(self.path):
            if self._handle is None:
                self._create()
            if not self._is_begun:
                self._begin()
            self._append({"part": part, "key": key, "measured": measured})

    def close(self) -> None:
        """Close the file and let others use it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> "UnitFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _create(self) -> None:
        # Exclusive: of two evaluations that began at the same time the second one fails.
        self._handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666)
        self._lock()

    def _begin(self) -> None:
        assert self._handle is not None
        os.ftruncate(self._handle, 0)
        self._append({"format": FORMAT, "question": self._question})
        self._is_begun = True

    def _append(self, table: Mapping[str, Any]) -> None:
        assert self._handle is not None
        line = with_checksum(json.dumps(table)).encode() + b"\n"
        written = os.write(self._handle, line)
        if written != len(line):
            # A full disk takes a part of it; the next writing raises, with the reason.
            os.write(self._handle, line[written:])
        os.fsync(self._handle)

    def _lock(self) -> None:
        assert self._handle is not None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{self.path} is in use by another 'lcdist evaluate': wait for it, or choose "
                "another --output"
            ) from None

    def _read(self, overwrite: bool) -> None:
        """Read all finished units, unless there are none or they are to be overwritten."""
        assert self._handle is not None
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        # Cut off what was written in part, so that the next line begins a line.
        if len(whole) < len(content):
            os.ftruncate(self._handle, len(whole))
        lines = whole.splitlines()
        if overwrite or len(lines) < 2:
            return
        tables = [self._table(number, line) for number, line in enumerate(lines, 1)]
        self._check(tables[0])
        self._is_begun = True
        for number, table in enumerate(tables[1:], 2):
            try:
                self.measured[table["part"], table["key"]] = table["measured"]
            except (KeyError, TypeError):
                raise self._damaged(number, "it is no unit") from None

    def _table(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            text, is_checked = without_checksum(line.decode())
            table = json.loads(text)
        except ChecksumError as error:
            raise self._damaged(number, f"it differs from its crc32 {error}") from None
        except ValueError as error:
            raise self._damaged(number, str(error)) from None
        if not is_checked or not isinstance(table, dict):
            raise self._damaged(number, "it is no line that 'lcdist evaluate' wrote")
        return table

    def _damaged(self, number: int, why: str) -> ValueError:
        return ValueError(f"{self.path}:{number}: {why}; {AGAIN}")

    def _check(self, head: Mapping[str, Any]) -> None:
        """Raise ValueError if the file's question is another one."""
        before, now = head.get("question"), self._question
        if head.get("format") != FORMAT or not isinstance(before, dict):
            raise self._damaged(1, f"format {head.get('format')!r}, this version reads {FORMAT}")
        keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if not keys:
            return
        changes = [f"{k} was {_text(before.get(k))}, is {_text(now.get(k))}" for k in keys[:_SHOWN]]
        more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
        raise ValueError(
            f"{self.path} has what another evaluation measured ({'; '.join(changes)}{more}): "
            f"{AGAIN}"
        )


def _text(value: Any) -> str:
    return shortened(json.dumps(value))

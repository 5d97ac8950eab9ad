"""Read and write metrics.jsonl: one JSON line for each training step.

A number that is not finite is written as null, because NaN is not JSON (RFC 8259, section 6). It is
read back as NaN. A line ends with a CRC-32 of the rest: a digit with a flipped bit may be a digit.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lcdist.utils.atomic import write_file
from lcdist.utils.checked_lines import ChecksumError, with_checksum, without_checksum
from lcdist.utils.json_file import check_types
from lcdist.utils.progress import Progress, counter, silent

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step on rank 0, and of three parts of it."""

    step: float
    data: float
    forward_backward: float
    optimizer: float

    @property
    def other(self) -> float:
        """Seconds of the step that are in none of the three parts."""
        return self.step - self.data - self.forward_backward - self.optimizer


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Smallest and largest own work of a rank in one step, in seconds; `slowest` is the rank.

    Own work is loading data, forward and backward. It excludes waits in exchanges and everything
    after the reduction of gradients. It includes waits between pipeline stages.
    """

    least: float
    most: float
    slowest: int


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Metrics of one optimizer step.

    Attributes:
        step: number of the step, from 1.
        samples: samples consumed since the run began.
        tokens: tokens of this step over all ranks.
        loss: nats per token over all ranks.
        grad_norm: norm of all gradients before clipping.
        lr: learning rate.
        tokens_per_second: over all ranks.
        mfu_full: fraction of the peak FLOP/s of all devices, counting the full square of attention;
            None if the peak is unknown.
        mfu_causal: the same, counting the causal half.
        memory_bytes: peak of the rank that used most.
        exchange_bytes: bytes sent by exchange, of the rank that sent most.
        time: seconds on rank 0.
        wall: seconds since 1970 (UTC) at the end of the step.
        ranks: balance of the work; None in files of earlier versions.
        profiled: whether torch's profiler ran, which makes a step slower.
        skipped: whether the loss or a gradient was not finite, so that no weight changed.
    """

    step: int
    samples: int
    tokens: int
    loss: float
    grad_norm: float
    lr: float
    tokens_per_second: float
    mfu_full: float | None
    mfu_causal: float | None
    memory_bytes: int
    exchange_bytes: Mapping[str, int]
    time: StepTime
    wall: float
    ranks: RankTimes | None = None
    profiled: bool = False
    skipped: bool = False

    def to_json(self) -> str:
        """Return the record as one line of JSON, without a newline."""
        table = {f.name: getattr(self, f.name) for f in fields(self)}
        table["exchange_bytes"] = dict(self.exchange_bytes)
        table["time"] = {f.name: getattr(self.time, f.name) for f in fields(self.time)}
        table["time"]["other"] = self.time.other
        if self.ranks is not None:
            table["ranks"] = asdict(self.ranks)
        for rare in ("profiled", "skipped"):
            if not table[rare]:
                del table[rare]
        return json.dumps(_finite(table), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "StepRecord":
        """Read a record from one line; raise ValueError if the line is not a record."""
        table = json.loads(line)
        if not isinstance(table, dict):
            raise ValueError(f"expected an object, got {type(table).__name__}")
        time = _value(table, "time", dict)
        sent = _value(table, "exchange_bytes", dict)
        # Files of earlier versions do not have this key.
        ranks = _value(table, "ranks", dict) if table.get("ranks") is not None else None
        return cls(
            step=_value(table, "step", int),
            samples=_value(table, "samples", int),
            tokens=_value(table, "tokens", int),
            loss=_number(table, "loss"),
            grad_norm=_number(table, "grad_norm"),
            lr=_number(table, "lr"),
            tokens_per_second=_number(table, "tokens_per_second"),
            mfu_full=_number_or_none(table, "mfu_full"),
            mfu_causal=_number_or_none(table, "mfu_causal"),
            memory_bytes=_value(table, "memory_bytes", int),
            exchange_bytes={verb: _value(sent, verb, int) for verb in sent},
            time=StepTime(**{f.name: _number(time, f.name) for f in fields(StepTime)}),
            wall=_number(table, "wall"),
            ranks=None if ranks is None else _rank_times(ranks),
            profiled=table.get("profiled") is True,
            skipped=table.get("skipped") is True,
        )


def line_of(record: StepRecord) -> str:
    """Return the record as a line with its checksum, without a newline."""
    return with_checksum(record.to_json())


def _without_checksum(line: str) -> str:
    """Return what `to_json` gave; raise ValueError if it differs from the line's checksum.

    Lines of earlier versions have no checksum.
    """
    try:
        return without_checksum(line)[0]
    except ChecksumError as error:
        raise ValueError(
            f"it differs from its crc32 {error}; restore the file, or delete the line and with "
            "it what is known of the step"
        ) from error


def without_profiled(records: Sequence[StepRecord]) -> list[StepRecord]:
    """Return the records of steps that were not profiled; all of them if there are no others."""
    return [record for record in records if not record.profiled] or list(records)


def read_records(path: Path, progress: Progress = silent) -> list[StepRecord]:
    """Return the records of a metrics file, in order.

    A last line that a kill cut short is skipped with a warning.

    Args:
        path: the file.
        progress: called with the bytes that are read.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not a record, or steps do not increase; names file and line.
    """
    records: list[StepRecord] = []
    count = counter(f"reading {path.name}", path.stat().st_size, progress)
    for number, line, record in _lines(path):
        count(len(line) + 1)
        if records and record.step <= records[-1].step:
            raise ValueError(
                f"{path}:{number}: step {record.step} comes after step {records[-1].step}; "
                f"two runs seem to have written this file"
            )
        records.append(record)
    return records


def cut_records(path: Path, step: int) -> None:
    """Remove all lines after step `step` from a metrics file, atomically.

    The other lines are kept byte for byte. A missing file is not an error. Raises ValueError as
    `read_records` does.
    """
    if not path.exists():
        if step > 0:
            log.warning("%s is missing: the metrics of steps 1 to %d are lost", path, step)
        return
    kept = [line for _, line, record in _lines(path) if record.step <= step]
    if len(kept) < step:
        log.warning("%s has %d of the %d steps before the resume", path, len(kept), step)
    write_file(path, "".join(f"{line}\n" for line in kept))


def _lines(path: Path) -> Iterator[tuple[int, str, StepRecord]]:
    """Yield line number, text without newline, and record of each complete line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        number = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{number}: not UTF-8 text ({error.reason})") from error
    lines = text.split("\n")
    unterminated = lines.pop()
    for number, line in enumerate(lines, start=1):
        try:
            record = StepRecord.from_json(_without_checksum(line))
        except RecursionError as error:
            raise ValueError(f"{path}:{number}: not a record of a step: nested too deep") from error
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a record of a step: {error}") from error
        yield number, line, record
    if unterminated:
        log.warning("%s:%d: the last line is incomplete and was skipped", path, len(lines) + 1)


def _rank_times(table: Mapping[str, Any]) -> RankTimes:
    least, most = (_number(table, key) for key in ("least", "most"))
    return RankTimes(least=least, most=most, slowest=_value(table, "slowest", int))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _value(table: Mapping[str, Any], key: str, kind: type) -> Any:
    check_types(table, {key: kind}, "")
    return table[key]


def _number(table: Mapping[str, Any], key: str) -> float:
    value = _number_or_none(table, key)
    return math.nan if value is None else value


def _number_or_none(table: Mapping[str, Any], key: str) -> float | None:
    if table.get(key, 0) is None:
        return None
    return float(_value(table, key, float))

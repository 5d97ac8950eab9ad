"""The safetensors format, a few rows at a time: a header in JSON, then the tensors' bytes.

Eight bytes give the header's length; the header gives each tensor's dtype, shape and bytes, counted
from the header's end (the format's published description). Files are read and not mapped, so what
is resident is what was asked for.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# The format's own limit; a longer header is a damaged one.
MAX_HEADER = 100_000_000
_LENGTH = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. dtype: as the format writes it. start: its first byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape without its first dimension."""
        return self.shape[1:]

    def rows(self, first: int, stop: int) -> Tensor:
        """Rows first to stop of the tensor, in its own dtype, in memory of their own."""
        dtype = DTYPES[self.dtype]
        row = math.prod(self.row_shape) * dtype.itemsize
        held = np.fromfile(
            self.file, np.uint8, count=(stop - first) * row, offset=self.start + first * row
        )
        return torch.from_numpy(held).view(dtype).view(stop - first, *self.row_shape)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises ValueError naming the file where its header or its length is not what it should be, and
    naming the tensor where its dtype is not a floating-point one that can be trained.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH), "little")
        if size < _LENGTH or length > min(MAX_HEADER, size - _LENGTH):
            raise ValueError(f"{file} is truncated or no safetensors file: {size} bytes")
        try:
            table = json.loads(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{file} is no safetensors file: its header is not JSON") from error
    if not isinstance(table, dict):
        raise ValueError(f"{file} is no safetensors file: its header is not a table")
    table.pop("__metadata__", None)
    begin, end = _LENGTH + length, 0
    entries = {}
    for name, said in sorted(table.items(), key=lambda pair: _offsets(file, *pair)):
        entries[name], end = _entry(file, name, said, begin, end)
    if begin + end != size:
        state = "is truncated" if size < begin + end else "has bytes of no tensor"
        raise ValueError(f"{file} {state}: {size} bytes, its header tells of {begin + end}")
    return entries


def _offsets(file: Path, name: str, said: Any) -> list[int]:
    offsets = said.get("data_offsets") if isinstance(said, dict) else None
    if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise ValueError(f"{file}: the header's entry of {name} is damaged")
    return offsets


def _entry(
    file: Path, name: str, said: Mapping[str, Any], begin: int, end: int
) -> tuple[Entry, int]:
    """The tensor that a header tells of, and where it ends; `end`: where the one before does."""
    dtype, shape = said.get("dtype"), said.get("shape")
    if dtype not in DTYPES:
        raise ValueError(
            f"{file}: {name} is of dtype {dtype}; weights must be one of {', '.join(DTYPES)} "
            "(quantized ones cannot be trained: take the model they were made from)"
        )
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{file}: {name} has shape {shape!r}")
    first, last = said["data_offsets"]
    entry = Entry(file, dtype, tuple(shape), begin + first)
    if first != end or last - first != entry.nbytes:
        raise ValueError(
            f"{file}: the header gives {name} the bytes {first} to {last}; {dtype} {shape} after "
            f"the one before would be {end} to {end + entry.nbytes}"
        )
    return entry, last


@dataclass(frozen=True)
class Source:
    """A tensor to be written. pieces: calls that give its rows, in order, piece by piece."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Callable[[], Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(sources: Iterable[Source]) -> bytes:
    """The beginning of a file that holds `sources` in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for source in sources:
        begin, end = end, end + source.nbytes
        table[source.name] = {
            "dtype": NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    return len(text).to_bytes(_LENGTH, "little") + text


def write_tensors(stream: BinaryIO, sources: Sequence[Source]) -> None:
    """Write `sources` one after another, one piece in memory at a time."""
    stream.write(header_of(sources))
    for source in sources:
        written = 0
        for piece in source.pieces:
            rows = piece().contiguous()
            assert rows.dtype == source.dtype, (source.name, rows.dtype)
            stream.write(rows.view(torch.uint8).numpy().data)
            written += rows.nbytes
        assert written == source.nbytes, f"{source.name}: {written} of {source.nbytes} bytes"

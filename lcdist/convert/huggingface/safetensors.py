"""Read and write safetensors files some rows at a time.

The safetensors library reads: it checks headers and maps files. Each read opens the file anew and
copies its rows, so that no mapped page stays resident. The library writes a file from whole tensors
in memory, so `stream_tensors` writes here: a header in JSON, then the tensors' bytes, as the
published description of the format has it.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file. dtype: the format's name of it, such as "BF16"."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def rows(self, first: int, stop: int) -> Tensor:
        """Return a copy of rows first to stop, in the stored dtype."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_slice(self.name)[first:stop].clone()


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by name.

    Raises:
        ValueError: the file is truncated or damaged, or a tensor is empty or has a dtype that
            cannot be trained.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            return {name: _entry(file, name, opened.get_slice(name)) for name in names}
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is truncated, damaged or no safetensors file: "
            f"{reason}; copy or download it again"
        ) from error


def _entry(file: Path, name: str, stored: Any) -> TensorEntry:
    """Check one tensor of an opened file. stored: its slice object in the safetensors library."""
    dtype, shape = str(stored.get_dtype()), tuple(stored.get_shape())
    if dtype not in DTYPES:
        raise ValueError(
            f"{file}: {name} has dtype {dtype}; weights must have one of {', '.join(DTYPES)} "
            "(quantized weights cannot be trained: use the model they were made from)"
        )
    if 0 in shape:
        raise ValueError(f"{file}: {name} has shape {list(shape)}: it holds no number")
    return TensorEntry(file, name, dtype, shape)


@dataclass(frozen=True)
class TensorStream:
    """A tensor to write. pieces: functions that return its rows, in order, one piece each."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Sequence[Callable[[], Tensor]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def header_of(tensors: Iterable[TensorStream]) -> bytes:
    """Return the length and header of a file that holds `tensors` in this order."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        table[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text


def stream_tensors(
    file: BinaryIO, tensors: Sequence[TensorStream], count: Callable[[int], object] = int
) -> None:
    """Write header and tensors to `file`, with one piece in memory at a time.

    Args:
        file: open for writing.
        tensors: in the order of the file.
        count: called with the bytes of each piece.
    """
    file.write(header_of(tensors))
    for tensor in tensors:
        written = 0
        for piece in tensor.pieces:
            rows = piece().contiguous()
            assert rows.dtype == tensor.dtype, (tensor.name, rows.dtype)
            file.write(rows.view(torch.uint8).numpy().data)
            written += rows.nbytes
            count(rows.nbytes)
        assert written == tensor.nbytes, f"{tensor.name}: {written} of {tensor.nbytes} bytes"

"""Write Megatron's indexed format (.bin, .idx) as a stream, without Megatron or torch.

The format, of megatron.core.datasets.indexed_dataset: the .bin file is all tokens one after
another. The .idx file is a header of 34 bytes, then for every sequence its length in tokens (int32)
and its byte offset (int64), then the sequence number at which each document starts (int64).
"""

import shutil
import struct
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {np.uint16: 8, np.int32: 4}


class IndexedWriter:
    """Write documents to `prefix`.bin and, on a clean exit, their index to `prefix`.idx.

    Args:
        prefix: path without suffix.
        vocab_size: determines the width of a token, as in Megatron: 2 bytes below 65,500, else 4.
    """

    def __init__(self, prefix: str | Path, vocab_size: int) -> None:
        self._dtype = np.uint16 if vocab_size < 65500 else np.int32
        self._index_path = Path(f"{prefix}.idx")
        self._bin = open(f"{prefix}.bin", "wb")  # noqa: SIM115
        self._lengths = array("i")
        self.tokens = 0

    @property
    def documents(self) -> int:
        """Number of documents written so far."""
        return len(self._lengths)

    def add(self, tokens: Sequence[int]) -> None:
        """Append one document of token numbers."""
        self._bin.write(np.asarray(tokens, self._dtype).tobytes())
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)

    def add_all(self, prefix: str | Path) -> None:
        """Append the documents of another pair of files, written for the same vocab_size."""
        with open(f"{prefix}.bin", "rb") as tokens:
            shutil.copyfileobj(tokens, self._bin, 2**22)
        with open(f"{prefix}.idx", "rb") as index:
            header = index.read(len(_MAGIC) + 25)
            (count,) = struct.unpack_from("<Q", header, len(_MAGIC) + 9)
            lengths = np.frombuffer(index.read(4 * count), np.int32)
        self._lengths.frombytes(lengths.tobytes())
        self.tokens += int(lengths.sum(dtype=np.int64))

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._bin.close()
        if kind is not None:
            return
        lengths = np.asarray(self._lengths, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(self._dtype).itemsize
        starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        with open(self._index_path, "wb") as index:
            index.write(_MAGIC + struct.pack("<QB", 1, _DTYPE_CODES[self._dtype]))
            index.write(struct.pack("<QQ", len(lengths), len(lengths) + 1))
            for table in (lengths, starts, np.arange(len(lengths) + 1, dtype=np.int64)):
                index.write(table.tobytes())

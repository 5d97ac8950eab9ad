"""Write and check Megatron's indexed format (.bin, .idx), without Megatron or torch.

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

from lcdist.data.meta import REMAKE
from lcdist.utils.errors import naming

# Ending of the file that says which tokens of a split are to be predicted.
TARGETS = ".targets"
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {np.uint16: 8, np.int32: 4}
# Bytes of a token by code.
_WIDTHS = {8: 2, 4: 4}
# Magic, version, code of the token type, number of sequences, number of document borders.
_HEADER = struct.Struct("<9sQBQQ")


class IndexedWriter:
    """Write documents to `prefix`.bin and, on a clean exit, their index to `prefix`.idx.

    Args:
        prefix: path without suffix.
        vocab_size: determines the width of a token, as in Megatron: 2 bytes below 65,500, else 4.
        with_targets: whether documents say which tokens to predict: `prefix`.targets has a byte
            for each token, 1 or 0.
    """

    def __init__(self, prefix: str | Path, vocab_size: int, with_targets: bool = False) -> None:
        self._dtype = np.uint16 if vocab_size < 65500 else np.int32
        self._index_path = Path(f"{prefix}.idx")
        self._bin = open(f"{prefix}.bin", "wb")  # noqa: SIM115
        self._targets = open(f"{prefix}{TARGETS}", "wb") if with_targets else None  # noqa: SIM115
        self._lengths = array("i")
        self.tokens = self.targets = 0

    @property
    def documents(self) -> int:
        """Number of documents written so far."""
        return len(self._lengths)

    def add(self, tokens: Sequence[int], targets: Sequence[bool] | None = None) -> None:
        """Append one document of token numbers; targets: which of them to predict."""
        with naming(self._bin.name):
            self._bin.write(np.asarray(tokens, self._dtype).tobytes())
        if self._targets is not None:
            assert targets is not None and len(targets) == len(tokens)
            with naming(self._targets.name):
                self._targets.write(bytes(targets))
            self.targets += sum(targets)
        self._lengths.append(len(tokens))
        self.tokens += len(tokens)

    def add_all(self, prefix: str | Path) -> None:
        """Append the documents of another pair of files, written for the same vocab_size."""
        with open(f"{prefix}.bin", "rb") as tokens, naming(self._bin.name):
            shutil.copyfileobj(tokens, self._bin, 2**22)
        if self._targets is not None:
            targets = Path(f"{prefix}{TARGETS}").read_bytes()
            with naming(self._targets.name):
                self._targets.write(targets)
            self.targets += targets.count(1)
        with open(f"{prefix}.idx", "rb") as index:
            _, _, _, count, _ = _HEADER.unpack(index.read(_HEADER.size))
            lengths = np.frombuffer(index.read(4 * count), np.int32)
        self._lengths.frombytes(lengths.tobytes())
        self.tokens += int(lengths.sum(dtype=np.int64))

    def __enter__(self) -> "IndexedWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with naming(self._bin.name):
            self._bin.close()
        if self._targets is not None:
            with naming(self._targets.name):
                self._targets.close()
        if kind is not None:
            return
        lengths = np.asarray(self._lengths, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(self._dtype).itemsize
        starts = np.concatenate([np.zeros(1, np.int64), ends])[: len(lengths)]
        with naming(self._index_path), open(self._index_path, "wb") as index:
            code, count = _DTYPE_CODES[self._dtype], len(lengths)
            index.write(_HEADER.pack(_MAGIC, 1, code, count, count + 1))
            for table in (lengths, starts, np.arange(len(lengths) + 1, dtype=np.int64)):
                index.write(table.tobytes())


def document_lengths(prefix: str | Path) -> np.ndarray:
    """Return the tokens of every document of `prefix`.idx, int32 on disk."""
    path = Path(f"{prefix}.idx")
    _, _, _, count, _ = _read_header(path)
    return (
        np.memmap(path, np.int32, "r", _HEADER.size, (count,)) if count else np.zeros(0, np.int32)
    )


# Documents checked at once: bounds the memory, and a block costs about as much as reading it.
_CHECKED_DOCUMENTS = 2**20


def check_index(prefix: str | Path) -> None:
    """Check that `prefix`.idx is whole.

    Sizes, positive lengths, offsets that are their sums, and one sequence a document. The index is
    read once, block by block: 20 bytes a document.

    Raises:
        ValueError: it is not; the message names the first document that is wrong.
    """
    path = Path(f"{prefix}.idx")
    problem = _header_problem(path) or _document_problem(path)
    if problem:
        raise ValueError(f"{path}: {problem}; {REMAKE}")


def _header_problem(path: Path) -> str:
    size = path.stat().st_size
    if size < _HEADER.size:
        return f"has {size} bytes, fewer than the {_HEADER.size} of an index's header"
    magic, version, code, count, borders = _read_header(path)
    if (magic, version) != (_MAGIC, 1):
        return "does not begin as an index of version 1"
    if code not in _WIDTHS:
        return f"has tokens of an unknown type ({code})"
    expected = _HEADER.size + 12 * count + 8 * borders
    if borders != count + 1 or size != expected:
        return f"lists {count} documents in {size} bytes, which take {expected}"
    return ""


def _document_problem(path: Path) -> str:
    _, _, code, count, borders = _read_header(path)
    tables = np.memmap(path, np.uint8, "r")
    lengths = np.frombuffer(tables, np.int32, count, _HEADER.size)
    starts = np.frombuffer(tables, np.int64, count, _HEADER.size + 4 * count)
    sequences = np.frombuffer(tables, np.int64, borders, _HEADER.size + 12 * count)
    offset = 0
    for first in range(0, count, _CHECKED_DOCUMENTS):
        block = lengths[first : first + _CHECKED_DOCUMENTS].astype(np.int64)
        if block.min() < 1:
            number = int(np.argmax(block < 1))
            return f"document {first + number} has {block[number]} tokens, fewer than 1"
        ends = offset + np.cumsum(block) * _WIDTHS[code]
        wanted = np.concatenate([[offset], ends[:-1]])
        wrong = starts[first : first + _CHECKED_DOCUMENTS] != wanted
        if wrong.any():
            number = int(np.argmax(wrong))
            return (
                f"document {first + number} begins at byte {starts[first + number]}, and those "
                f"before it end at byte {wanted[number]}"
            )
        offset = int(ends[-1])
    for first in range(0, borders, _CHECKED_DOCUMENTS):
        block = sequences[first : first + _CHECKED_DOCUMENTS]
        wrong = block != np.arange(first, first + len(block))
        if wrong.any():
            number = int(np.argmax(wrong))
            return (
                f"document {first + number} begins with sequence {block[number]}, and each "
                "document is one sequence"
            )
    return ""


def _read_header(path: Path) -> tuple[bytes, int, int, int, int]:
    """Return magic, version, code of the token type, sequences, and document borders."""
    with open(path, "rb") as file:
        return _HEADER.unpack(file.read(_HEADER.size))

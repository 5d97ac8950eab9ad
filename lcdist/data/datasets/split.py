"""One split of a token folder: its documents, read whole, in windows or in spans."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.data.datasets.long_documents import LongDocuments
from lcdist.data.datasets.sample import check_seed, random_uint64
from lcdist.data.meta import REMAKE, read_meta
from lcdist.data.prepare.indexed import TARGETS, check_index
from lcdist.layout.documents import DocumentLayout
from lcdist.utils.errors import RankError
from megatron.core.datasets.indexed_dataset import IndexedDataset


class Span(NamedTuple):
    """Slots [start, stop) of one document."""

    document: int
    start: int
    stop: int


class TokenSplit:
    """The documents of one split of a token folder, in stored order.

    Attributes:
        meta: contents of meta.json.
        document_lengths: int64 `[num_documents]`, in tokens.
        num_tokens: total number of tokens.
        targets: bool `[num_tokens]`, on disk, whether a token is part of an answer; None: the
            folder holds no conversations.

    Raises:
        ValueError: the folder is missing, incomplete or damaged, or does not have this split.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.meta = read_meta(folder)
        self.folder, self.split = folder, split
        if split not in self.meta.tokens:
            raise ValueError(
                f"data folder {folder}: has no split {split!r}, only "
                f"{', '.join(self.meta.tokens)}; tokenize with a valid_fraction above 0"
            )
        prefix = str(Path(folder, split))
        check_index(prefix)
        self._tokens = IndexedDataset(prefix)
        self.document_lengths: np.ndarray = self._tokens.sequence_lengths.astype(np.int64)
        self.vocab_size: int = self.meta.vocab_size
        self.num_tokens = int(self.document_lengths.sum())
        bytes_needed = self.num_tokens * np.dtype(self._tokens.index.dtype).itemsize
        size = Path(f"{prefix}.bin").stat().st_size
        if size != bytes_needed or self.num_tokens != self.meta.tokens[split]:
            raise ValueError(
                f"{prefix}.bin has {size} bytes, but {prefix}.idx lists {self.num_tokens} tokens "
                f"in {bytes_needed} bytes and meta.json {self.meta.tokens[split]} tokens; {REMAKE}"
            )
        self.targets = None if self.meta.targets is None else self._open_targets(prefix)

    def _open_targets(self, prefix: str) -> np.ndarray:
        path = Path(f"{prefix}{TARGETS}")
        size = path.stat().st_size if path.is_file() else 0
        if size != self.num_tokens:
            raise ValueError(
                f"{path} has {size} bytes, one for each of {self.num_tokens} tokens is needed; "
                f"{REMAKE}"
            )
        return np.memmap(path, np.uint8, "r")

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.document_lengths)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Return the place of each document's first token in stored order, int64."""
        return np.cumsum(self.document_lengths) - self.document_lengths

    def document(self, number: int) -> Tensor:
        """Return the tokens of a document, its eos included: int64 `[n]`."""
        return self._read(number, 0, int(self.document_lengths[number]))

    def document_targets(self, number: int) -> Tensor:
        """Return which tokens of a conversation are part of an answer: bool `[n]`."""
        span = Span(number, 0, int(self.document_lengths[number]))
        return self._read_targets(span, DocumentLayout())

    def longest_documents(self, min_tokens: int = 1) -> list[int]:
        """Return the numbers of all documents of at least `min_tokens` tokens, longest first."""
        order = np.argsort(-self.document_lengths, kind="stable")
        return [int(i) for i in order if self.document_lengths[i] >= min_tokens]

    def window(self, start: int, num_tokens: int) -> Tensor:
        """Return tokens [start, start + num_tokens) of the split in stored order: int64.

        Raises:
            ValueError: the split does not contain this window.
        """
        if start < 0 or num_tokens < 1 or start + num_tokens > self.num_tokens:
            raise ValueError(
                f"window of {num_tokens} tokens at {start}: the {self.split} split has "
                f"{self.num_tokens}"
            )
        spans, _ = self._find_spans(self._stored_order, start, num_tokens, self.document_lengths)
        return torch.cat([self._read_span(span, DocumentLayout()) for span in spans])

    @cached_property
    def _stored_order(self) -> "DocumentOrder":
        return DocumentOrder(np.arange(self.num_documents), np.cumsum(self.document_lengths))

    def _read(self, number: int, start: int, length: int) -> Tensor:
        tokens = np.asarray(self._tokens.get(number, start, length))
        # Each token is checked where it is read. A check of the whole file at the start would read
        # all of it, and would miss what changes later. Unsigned, a negative number is a large one.
        if tokens.view(f"u{tokens.itemsize}").max() >= self.vocab_size:
            self._refuse(number, start, tokens)
        return torch.from_numpy(tokens.astype(np.int64))

    def _refuse(self, number: int, start: int, tokens: np.ndarray) -> NoReturn:
        """Raise RankError: a token is not in the vocabulary."""
        place = int(np.argmax((tokens < 0) | (tokens >= self.vocab_size)))
        raise RankError(
            f"{self.folder}/{self.split}.bin: token {start + place} of document {number} is "
            f"{tokens[place]}, and the vocabulary has 0 to {self.vocab_size - 1}; {REMAKE}"
        )

    def _find_spans(
        self, order: "DocumentOrder", start: int, length: int, document_lengths: np.ndarray
    ) -> tuple[list[Span], list[int]]:
        """Find the documents in slots [start, start + length) of `order`.

        Args:
            order: order of the documents.
            start: first slot.
            length: number of slots; fewer are returned if `order` ends before.
            document_lengths: lengths of the documents in slots.

        Returns:
            The document spans, and the document ends inside the range, relative to `start`.
        """
        spans, borders, range_end = [], [], min(start + length, int(order.ends[-1]))
        index = int(np.searchsorted(order.ends, start, side="right"))
        position = start
        while position < range_end:
            number, document_end = int(order.documents[index]), int(order.ends[index])
            document_start = document_end - int(document_lengths[number])
            span_end = min(document_end, range_end)
            spans.append(Span(number, position - document_start, span_end - document_start))
            if span_end == document_end:
                borders.append(document_end - start)
            position, index = span_end, index + 1
        return spans, borders

    def _text_range(self, span: Span, document_layout: DocumentLayout) -> tuple[int, int]:
        """Return the tokens [first, last) of a document that a span of its slots holds."""
        length = int(self.document_lengths[span.document])
        first = min(document_layout.num_text_slots(span.start), length)
        return first, min(document_layout.num_text_slots(span.stop), length)

    def _read_targets(self, span: Span, document_layout: DocumentLayout) -> Tensor:
        """Return which text tokens of a span are part of an answer: bool, one for each."""
        assert self.targets is not None
        first, last = self._text_range(span, document_layout)
        start = int(self.document_starts[span.document])
        found = np.array(self.targets[start + first : start + last])
        if found.max(initial=0) > 1:
            place = start + first + int(np.argmax(found > 1))
            raise RankError(
                f"{self.folder}/{self.split}{TARGETS}: byte {place} is {found.max()}, and may be 0 "
                f"or 1; {REMAKE}"
            )
        return torch.from_numpy(found.astype(bool))

    def _read_span(self, span: Span, document_layout: DocumentLayout) -> Tensor:
        """Return the slots of a span: int64 `[span.stop - span.start]`."""
        length = int(self.document_lengths[span.document])
        first, last = self._text_range(span, document_layout)
        if last > first:
            text = self._read(span.document, first, last - first)
        else:
            text = torch.zeros(0, dtype=torch.int64)
        if document_layout.plain:
            return text
        return document_layout.place(text, span.start, span.stop, length)


@dataclass(frozen=True)
class DocumentOrder:
    """A sequence of documents: their numbers, and the slot at which each one ends."""

    documents: np.ndarray
    ends: np.ndarray


class SampledSplit(TokenSplit):
    """A split from which samples of `seqlen` slots are made.

    Args:
        folder: token folder.
        split: name of the split.
        seqlen: slots per sample.
        seed: seed of all orders.
        document_layout: layout of the documents; by default every slot is a token.
        long_documents: upsampling of long documents.
        answers_only: whether of conversations only the answers are to be predicted.

    Raises:
        ValueError: as `TokenSplit`; seqlen is below 1; or seqlen is not a
            multiple of document_layout.step, so that a row would start inside a block.
    """

    def __init__(  # noqa: PLR0913
        self,
        folder: str | Path,
        split: str,
        seqlen: int,
        seed: int,
        document_layout: DocumentLayout | None = None,
        long_documents: LongDocuments | None = None,
        answers_only: bool = True,
    ) -> None:
        super().__init__(folder, split)
        self._answers_only = answers_only and self.targets is not None
        check_seed(seed)
        if seqlen < 1:
            raise ValueError(f"train.seqlen = {seqlen}: must be at least 1")
        self.document_layout = document_layout or DocumentLayout()
        self.long_documents = long_documents or LongDocuments()
        self._slot_lengths = self.document_layout.length(self.document_lengths)
        self._copies = self.long_documents.copies(self.document_lengths)
        self.round_slots = int((self._slot_lengths * self._copies).sum())
        _check_seqlen(seqlen, self.document_layout)
        self.seqlen, self.seed = seqlen, seed
        self._make_rows()

    def _is_target(self, spans: Sequence[Span]) -> Tensor | None:
        """Return which text tokens of a sample's spans are to be predicted; None: all."""
        if not self._answers_only:
            return None
        return torch.cat([self._read_targets(span, self.document_layout) for span in spans])

    def _make_rows(self) -> None:
        """Prepare what maps sample numbers to documents."""
        raise NotImplementedError


def _check_seqlen(seqlen: int, document_layout: DocumentLayout) -> None:
    """Raise ValueError if rows of `seqlen` slots would start inside a block."""
    step = document_layout.step
    if seqlen % step:
        raise ValueError(
            f"train.seqlen = {seqlen}: with data.documents = 'pack' this attention needs a "
            f"multiple of {step}; the next is {-(-seqlen // step) * step}"
        )


def permutation(count: int, key: tuple[int, int], stream: int) -> np.ndarray:
    """Return the numbers below `count` in an order determined by `key` and `stream` alone."""
    return np.argsort(random_uint64(count, key, stream), kind="stable")

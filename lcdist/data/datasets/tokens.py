"""Token folders as data sets: documents in a new order every epoch, cut into windows.

The documents of epoch 0, 1, 2, ..., each epoch in its own order, are joined to one endless string
of tokens (of slots, where `DocumentLayout` places documents), and sample windows of seqlen tile it.
Nothing falls off at the end of an epoch: the last window that starts in it runs on into the next.
So in a corpus of T tokens epoch e has the windows from ceil(e T / seqlen) up to
ceil((e + 1) T / seqlen), in shuffled order, and window w belongs to epoch floor(w seqlen / T); all
of it a function of (seed, index). Where long documents are drawn more often, an epoch is a round of
`LongDocuments`, which has some documents several times.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.data.datasets.long_documents import LongDocuments
from lcdist.data.datasets.sample import Sample, check_seed, raw_numbers
from lcdist.data.meta import read_meta
from lcdist.layout.documents import DocumentLayout
from megatron.core.datasets.indexed_dataset import IndexedDataset

_DOCUMENTS, _WINDOWS = 0, 1
# A document's number, and slots [start, stop) of it.
Span = tuple[int, int, int]
_NO_TEXT = torch.zeros(0, dtype=torch.int64)


class TokenSplit:
    """The documents of one split of a token folder, in the order they were written.

    Raises ValueError where the folder is missing, half-written or damaged, or has no such split.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        self.meta = read_meta(folder)
        self.split = split
        if split not in self.meta.tokens:
            raise ValueError(
                f"data folder {folder}: has no split {split!r}, only "
                f"{', '.join(self.meta.tokens)}; tokenize with a valid_fraction above 0"
            )
        prefix = str(Path(folder, split))
        self._tokens = IndexedDataset(prefix)
        self.document_lengths: np.ndarray = self._tokens.sequence_lengths.astype(np.int64)
        self.vocab_size: int = self.meta.vocab_size
        self.tokens = int(self.document_lengths.sum())
        bytes_needed = self.tokens * np.dtype(self._tokens.index.dtype).itemsize
        size = Path(f"{prefix}.bin").stat().st_size
        if size != bytes_needed or self.tokens != self.meta.tokens[split]:
            raise ValueError(
                f"{prefix}.bin has {size} bytes, but {prefix}.idx lists {self.tokens} tokens in "
                f"{bytes_needed} bytes and meta.json {self.meta.tokens[split]} tokens; remove the "
                "folder and make it again with `lcdist tokenize`"
            )

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.document_lengths)

    def document(self, number: int) -> Tensor:
        """The tokens of a document, its eos included: int64 `[n]`."""
        return self._read(number, 0, int(self.document_lengths[number]))

    def longest(self, tokens: int = 1) -> list[int]:
        """The numbers of all documents of at least `tokens` tokens, longest first."""
        order = np.argsort(-self.document_lengths, kind="stable")
        return [int(i) for i in order if self.document_lengths[i] >= tokens]

    def window(self, start: int, tokens: int) -> Tensor:
        """Tokens [start, start + tokens) of the split as it was written: int64 `[tokens]`.

        Raises ValueError where the split does not reach that far.
        """
        if start < 0 or tokens < 1 or start + tokens > self.tokens:
            raise ValueError(
                f"window of {tokens} tokens at {start}: the {self.split} split has {self.tokens}"
            )
        spans = self._spans(self._stored, start, tokens, self.document_lengths)[0]
        return torch.cat([self._laid(span, DocumentLayout()) for span in spans])

    @cached_property
    def _stored(self) -> "_Order":
        return _Order(np.arange(self.documents), np.cumsum(self.document_lengths))

    def _read(self, number: int, start: int, length: int) -> Tensor:
        found = self._tokens.get(number, start, length)
        return torch.from_numpy(np.asarray(found).astype(np.int64))

    def _spans(
        self, order: "_Order", start: int, wanted: int, lengths: np.ndarray
    ) -> tuple[list[Span], list[int]]:
        """Slots [start, start + wanted) of `order`, as far as it goes; where documents end.

        lengths: of the documents, in slots.
        """
        spans, borders, stop = [], [], min(start + wanted, int(order.ends[-1]))
        place = int(np.searchsorted(order.ends, start, side="right"))
        at = start
        while at < stop:
            number, end = int(order.documents[place]), int(order.ends[place])
            begin = end - int(lengths[number])
            upto = min(end, stop)
            spans.append((number, at - begin, upto - begin))
            if upto == end:
                borders.append(end - start)
            at, place = upto, place + 1
        return spans, borders

    def _laid(self, span: Span, slots: DocumentLayout) -> Tensor:
        """The slots of a span."""
        number, start, stop = span
        tokens = int(self.document_lengths[number])
        first, last = (min(slots.num_text_slots(slot), tokens) for slot in (start, stop))
        text = self._read(number, first, last - first) if last > first else _NO_TEXT
        return text if slots.plain else slots.place(text, start, stop, tokens)


@dataclass(frozen=True)
class _Order:
    """Documents one after another: their numbers, and the slot each ends before."""

    documents: np.ndarray
    ends: np.ndarray


class TokenDataset(TokenSplit):
    """Endless samples of `seqlen` slots from a split of a token folder.

    slots: how documents are laid out; by default a slot is a token. long: which documents are drawn
    more often. Raises ValueError as `TokenSplit` does, where the split is smaller than one sample,
    and where seqlen is not a multiple of slots.step, so that a row would begin inside a block.
    """

    def __init__(  # noqa: PLR0913
        self,
        folder: str | Path,
        split: str,
        seqlen: int,
        seed: int,
        slots: DocumentLayout | None = None,
        long: LongDocuments | None = None,
    ) -> None:
        super().__init__(folder, split)
        check_seed(seed)
        self.slots = slots or DocumentLayout()
        self.long = long or LongDocuments()
        self._slot_lengths = self.slots.length(self.document_lengths)
        self._copies = self.long.copies(self.document_lengths)
        self.length = int((self._slot_lengths * self._copies).sum())
        if seqlen < 1 or self.length < seqlen + 1:
            raise ValueError(
                f"data folder {folder}: its {split} split has {self.length} tokens, fewer than "
                f"one sample of seqlen + 1 = {seqlen + 1}; give more text or a smaller seqlen"
            )
        check_rows(seqlen, self.slots)
        self.seqlen = seqlen
        self.seed = seed
        self._orders: dict[int, _Order] = {}
        self._windows: tuple[int, np.ndarray] | None = None

    @property
    def round_rows(self) -> Fraction:
        """Samples of a round."""
        return Fraction(self.length, self.seqlen)

    def sample(self, index: int) -> Sample:
        """The sample with number `index` >= 0; the same wherever and whenever it is drawn."""
        spans, borders = self._window(index)
        return Sample(
            tokens=torch.cat([self._laid(span, self.slots) for span in spans]),
            cu_seqlens=self._table(borders),
            closed=self.seqlen in borders,
        )

    def table(self, index: int) -> Tensor:
        """`cu_seqlens` of the sample with number `index`, without its tokens."""
        return self._table(self._window(index)[1])

    def _table(self, borders: list[int]) -> Tensor:
        inside = [border for border in borders if border < self.seqlen]
        return torch.tensor([0, *inside, self.seqlen], dtype=torch.int32)

    def _window(self, index: int) -> tuple[list[Span], list[int]]:
        """The spans of a sample and of the token after it, and where documents end."""
        assert index >= 0
        epoch = index * self.seqlen // self.length
        first = self._first_window(epoch)
        window = first + int(self._window_order(epoch)[index - first])
        start = window * self.seqlen - epoch * self.length
        wanted, lengths = self.seqlen + 1, self._slot_lengths
        spans, borders = self._spans(self._order(epoch), start, wanted, lengths)
        held = sum(stop - begin for _, begin, stop in spans)
        if held < wanted:
            more, later = self._spans(self._order(epoch + 1), 0, wanted - held, lengths)
            spans, borders = spans + more, borders + [held + border for border in later]
        return spans, borders

    def _first_window(self, epoch: int) -> int:
        return -(-epoch * self.length // self.seqlen)

    def _window_order(self, epoch: int) -> np.ndarray:
        if self._windows is None or self._windows[0] != epoch:
            count = self._first_window(epoch + 1) - self._first_window(epoch)
            self._windows = epoch, permutation(count, (self.seed, epoch), _WINDOWS)
        return self._windows[1]

    def _order(self, epoch: int) -> _Order:
        if epoch not in self._orders:
            # Two epochs are in use where a window crosses from one into the next.
            kept = {e: order for e, order in self._orders.items() if abs(e - epoch) == 1}
            numbers = np.repeat(np.arange(self.documents), self._copies)
            documents = numbers[permutation(len(numbers), (self.seed, epoch), _DOCUMENTS)]
            kept[epoch] = _Order(documents, np.cumsum(self._slot_lengths[documents]))
            self._orders = kept
        return self._orders[epoch]


def check_rows(seqlen: int, slots: DocumentLayout) -> None:
    """Raise ValueError where rows of `seqlen` slots would begin inside a block."""
    if seqlen % slots.step:
        raise ValueError(
            f"train.seqlen = {seqlen}: with data.documents = 'pack' this attention needs a "
            f"multiple of {slots.step}; the next is {-(-seqlen // slots.step) * slots.step}"
        )


def permutation(count: int, key: tuple[int, int], stream: int) -> np.ndarray:
    """The numbers below `count` in an order that `key` and `stream` alone decide."""
    return np.argsort(raw_numbers(count, key, stream), kind="stable")

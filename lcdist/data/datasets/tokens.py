"""Token folders as datasets: documents in a new order every epoch, cut into windows.

The documents of epoch 0, 1, 2, ..., each epoch in its own order, form one endless string of tokens
(of slots, if a `DocumentLayout` places the documents). Windows of seqlen tokens tile this string.
Nothing is dropped at the end of an epoch: the last window that starts in an epoch continues into
the next one. In a corpus of T tokens, epoch e has the windows from ceil(e T / seqlen) up to
ceil((e + 1) T / seqlen) in shuffled order, and window w belongs to epoch floor(w seqlen / T). All
of this is a function of (seed, index). If long documents are upsampled, an epoch is one round of
`LongDocuments`, which contains some documents several times.
"""

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lcdist.data.datasets.sample import Sample
from lcdist.data.datasets.split import DocumentOrder, SampledSplit, Span, permutation

_DOCUMENTS_STREAM, _WINDOWS_STREAM = 0, 1


class TokenDataset(SampledSplit):
    """Endless samples of `seqlen` slots from a split of a token folder.

    The arguments are those of `SampledSplit`.

    Raises:
        ValueError: as `SampledSplit`; or the split is smaller than one sample.
    """

    def _make_rows(self) -> None:
        if self.round_slots < self.seqlen + 1:
            raise ValueError(
                f"data folder {self.folder}: its {self.split} split has {self.round_slots} tokens, "
                f"fewer than one sample of seqlen + 1 = {self.seqlen + 1}; give more text or a "
                "smaller seqlen"
            )
        self._document_orders: dict[int, DocumentOrder] = {}
        self._window_order: tuple[int, np.ndarray] | None = None

    @property
    def samples_per_round(self) -> Fraction:
        """Number of samples in a round."""
        return Fraction(self.round_slots, self.seqlen)

    def sample(self, index: int) -> Sample:
        """Return sample number `index` >= 0, a function of (seed, index) alone."""
        spans, borders = self._sample_spans(index)
        return Sample(
            tokens=torch.cat([self._read_span(span, self.document_layout) for span in spans]),
            cu_seqlens=self._cu_seqlens(borders),
            ends_document=self.seqlen in borders,
            is_target=self._is_target(spans),
        )

    def cu_seqlens(self, index: int) -> Tensor:
        """Return `cu_seqlens` of sample number `index` without reading its tokens."""
        return self._cu_seqlens(self._sample_spans(index)[1])

    def _cu_seqlens(self, borders: list[int]) -> Tensor:
        inner_borders = [border for border in borders if border < self.seqlen]
        return torch.tensor([0, *inner_borders, self.seqlen], dtype=torch.int32)

    def _sample_spans(self, index: int) -> tuple[list[Span], list[int]]:
        """Return the spans of a sample and its last label, and the document ends among them."""
        assert index >= 0
        epoch = index * self.seqlen // self.round_slots
        first_window = self._first_window(epoch)
        window = first_window + int(self._windows_of(epoch)[index - first_window])
        start = window * self.seqlen - epoch * self.round_slots
        length, lengths = self.seqlen + 1, self._slot_lengths
        spans, borders = self._find_spans(self._documents_of(epoch), start, length, lengths)
        filled = sum(span.stop - span.start for span in spans)
        if filled < length:
            next_order = self._documents_of(epoch + 1)
            more_spans, more_borders = self._find_spans(next_order, 0, length - filled, lengths)
            spans += more_spans
            borders += [filled + border for border in more_borders]
        return spans, borders

    def _first_window(self, epoch: int) -> int:
        return -(-epoch * self.round_slots // self.seqlen)

    def _windows_of(self, epoch: int) -> np.ndarray:
        """Return the order of the windows of `epoch`, numbered from 0."""
        if self._window_order is None or self._window_order[0] != epoch:
            count = self._first_window(epoch + 1) - self._first_window(epoch)
            self._window_order = epoch, permutation(count, (self.seed, epoch), _WINDOWS_STREAM)
        return self._window_order[1]

    def _documents_of(self, epoch: int) -> DocumentOrder:
        """Return the order of the documents of `epoch`."""
        if epoch not in self._document_orders:
            # A window that crosses from one epoch into the next needs the orders of both.
            orders = {e: o for e, o in self._document_orders.items() if abs(e - epoch) == 1}
            numbers = np.repeat(np.arange(self.num_documents), self._copies)
            shuffled = permutation(len(numbers), (self.seed, epoch), _DOCUMENTS_STREAM)
            documents = numbers[shuffled]
            ends = np.cumsum(self._slot_lengths[documents])
            orders[epoch] = DocumentOrder(documents, ends)
            self._document_orders = orders
        return self._document_orders[epoch]

"""Token folders as rows of whole documents, packed best fit (arXiv:2404.10830).

Documents longer than a row are cut into full rows and a rest. The rests and all other documents are
packed once over a whole round. Each row ends with padding if nothing fits. Attention does not cross
documents, so the other documents in a row do not matter. The rows therefore stay the same, and
every epoch uses all of them in an order of its own: sample i is row i % num_rows of epoch
i // num_rows.
"""

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lcdist.data.datasets.best_fit import best_fit
from lcdist.data.datasets.sample import Sample
from lcdist.data.datasets.split import SampledSplit, Span, permutation
from lcdist.layout.documents import PADDING

# Random streams of `permutation`. `TokenDataset` also uses stream 1, for another purpose.
_ROWS_STREAM, _PACKING_STREAM = 1, 2


class PackedDataset(SampledSplit):
    """Endless samples of `seqlen` slots: rows of documents that are whole if they fit in a row.

    The arguments and errors are those of `SampledSplit`.
    """

    def _make_rows(self) -> None:
        """Make the rows of a round: full rows of long documents first, then packed rows.

        Row i has the pieces [_offsets[i], _offsets[i + 1]). Piece j starts at slot _starts[j] of
        document _documents[j].
        """
        self._epoch_order: tuple[int, np.ndarray] | None = None
        documents = np.repeat(np.arange(self.num_documents), self._copies)
        # Shuffle: otherwise documents of equal length would share rows in their stored order.
        shuffled = permutation(len(documents), (self.seed, 0), _PACKING_STREAM)
        documents = documents[shuffled]
        lengths = self._slot_lengths[documents]
        num_full, rest = lengths // self.seqlen, lengths % self.seqlen
        self.num_cut_documents = int((lengths > self.seqlen).sum())
        full_rows = np.repeat(documents, num_full)
        # Number of each full row within its document.
        row_in_document = np.arange(len(full_rows)) - np.repeat(
            np.cumsum(num_full) - num_full, num_full
        )
        with_rest = np.flatnonzero(rest)
        rows = best_fit(rest[with_rest], self.seqlen)
        members = with_rest[rows.members]
        rest_starts = lengths[members] - rest[members]
        self._documents = np.concatenate([full_rows, documents[members]])
        self._starts = np.concatenate([row_in_document * self.seqlen, rest_starts])
        self._offsets = np.concatenate([np.arange(len(full_rows)), len(full_rows) + rows.offsets])

    @property
    def num_rows(self) -> int:
        """Number of rows in a round."""
        return len(self._offsets) - 1

    @property
    def samples_per_round(self) -> Fraction:
        """Number of samples in a round."""
        return Fraction(self.num_rows)

    def sample(self, index: int) -> Sample:
        """Return sample number `index` >= 0, a function of (seed, index) alone."""
        spans = self._row_spans(index)
        read, (document, _, stop) = list(spans), spans[-1]
        ends_document = stop == self._slot_lengths[document]
        if not ends_document and sum(span.stop - span.start for span in spans) == self.seqlen:
            # The label of a full row's last token comes from the next row of the document.
            read.append(Span(document, stop, stop + 1))
        pieces = [self._read_span(span, self.document_layout) for span in read]
        missing = self.seqlen + 1 - sum(map(len, pieces))
        tokens = torch.cat([*pieces, torch.full((missing,), PADDING, dtype=torch.int64)])
        return Sample(tokens, self._cu_seqlens(spans), ends_document, self._is_target(read))

    def cu_seqlens(self, index: int) -> Tensor:
        """Return `cu_seqlens` of sample number `index` without reading its tokens."""
        return self._cu_seqlens(self._row_spans(index))

    def _cu_seqlens(self, spans: list[Span]) -> Tensor:
        ends = np.cumsum([span.stop - span.start for span in spans]).tolist()
        # Padding is a document of its own.
        padding = [self.seqlen] if ends[-1] < self.seqlen else []
        return torch.tensor([0, *ends, *padding], dtype=torch.int32)

    def _row_spans(self, index: int) -> list[Span]:
        """Return the document spans of sample number `index`."""
        assert index >= 0
        epoch, position = divmod(index, self.num_rows)
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = permutation(self.num_rows, (self.seed, epoch), _ROWS_STREAM)
            self._epoch_order = epoch, order
        row = int(self._epoch_order[1][position])
        spans = []
        for piece in range(int(self._offsets[row]), int(self._offsets[row + 1])):
            document, start = int(self._documents[piece]), int(self._starts[piece])
            stop = min(start + self.seqlen, int(self._slot_lengths[document]))
            spans.append(Span(document, start, stop))
        return spans

"""Token folders as rows of whole documents, packed best fit (arXiv:2404.10830).

Documents longer than a row are cut into full rows and a rest; rests and all other documents are
packed once, over a whole round, each row ending in padding where nothing fits. Attention does not
cross documents, so it does not matter to a document which others are in its row: the rows stay the
same, and every epoch takes all of them in an order of its own. So sample i is row i % rows of epoch
i // rows, whatever was drawn before.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lcdist.data.datasets.best_fit import best_fit
from lcdist.data.datasets.long_documents import LongDocuments
from lcdist.data.datasets.sample import Sample, check_seed
from lcdist.data.datasets.tokens import Span, TokenSplit, check_rows, permutation
from lcdist.layout.documents import PADDING, DocumentLayout

# Beside those that dataset.py draws with the same key.
_ROWS, _PACKING = 1, 2


class PackedDataset(TokenSplit):
    """Endless samples of `seqlen` slots, each a row of documents that are whole if they fit in it.

    slots, long: as for `TokenDataset`. Raises ValueError as `TokenSplit` does, and where seqlen is
    not a multiple of slots.step.
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
        self.slots, self.long = slots or DocumentLayout(), long or LongDocuments()
        if seqlen < 1:
            raise ValueError(f"train.seqlen = {seqlen}: must be at least 1")
        check_rows(seqlen, self.slots)
        self.seqlen, self.seed = seqlen, seed
        self._slot_lengths = self.slots.length(self.document_lengths)
        copies = self.long.copies(self.document_lengths)
        self.length = int((self._slot_lengths * copies).sum())
        self._fill(copies)
        self._order: tuple[int, np.ndarray] | None = None

    def _fill(self, copies: np.ndarray) -> None:
        """Whole rows of long documents first, then packed ones."""
        numbers = np.repeat(np.arange(self.documents), copies)
        # Which of the documents of one length come together is drawn, not as they were stored.
        numbers = numbers[permutation(len(numbers), (self.seed, 0), _PACKING)]
        lengths = self._slot_lengths[numbers]
        full, rest = lengths // self.seqlen, lengths % self.seqlen
        self.documents_cut = int((lengths > self.seqlen).sum())
        whole = np.repeat(numbers, full)
        # The place of each full row in its document.
        nth = np.arange(len(whole)) - np.repeat(np.cumsum(full) - full, full)
        packed = np.flatnonzero(rest)
        rows = best_fit(rest[packed], self.seqlen)
        members = packed[rows.members]
        starts = lengths[members] - rest[members]
        self._numbers = np.concatenate([whole, numbers[members]])
        self._starts = np.concatenate([nth * self.seqlen, starts])
        self._offsets = np.concatenate([np.arange(len(whole)), len(whole) + rows.offsets])

    @property
    def rows(self) -> int:
        """Rows of a round."""
        return len(self._offsets) - 1

    @property
    def round_rows(self) -> Fraction:
        """Samples of a round."""
        return Fraction(self.rows)

    def sample(self, index: int) -> Sample:
        """The sample with number `index` >= 0; the same wherever and whenever it is drawn."""
        spans = self._spans_of(index)
        pieces = [self._laid(span, self.slots) for span in spans]
        held = sum(map(len, pieces))
        number, _, stop = spans[-1]
        if held == self.seqlen and stop < self._slot_lengths[number]:
            # The label of a full row's last token, from the document's next row.
            pieces.append(self._laid((number, stop, stop + 1), self.slots))
            held += 1
        pieces.append(torch.full((self.seqlen + 1 - held,), PADDING, dtype=torch.int64))
        closed = stop == self._slot_lengths[number]
        return Sample(torch.cat(pieces), self._table(spans), closed=closed)

    def table(self, index: int) -> Tensor:
        """`cu_seqlens` of the sample with number `index`, without its tokens."""
        return self._table(self._spans_of(index))

    def _table(self, spans: list[Span]) -> Tensor:
        ends = np.cumsum([stop - start for _, start, stop in spans]).tolist()
        # Padding is a document of its own.
        padding = [self.seqlen] if ends[-1] < self.seqlen else []
        return torch.tensor([0, *ends, *padding], dtype=torch.int32)

    def _spans_of(self, index: int) -> list[Span]:
        assert index >= 0
        epoch, place = divmod(index, self.rows)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, permutation(self.rows, (self.seed, epoch), _ROWS)
        row = int(self._order[1][place])
        spans = []
        for member in range(int(self._offsets[row]), int(self._offsets[row + 1])):
            number, start = int(self._numbers[member]), int(self._starts[member])
            stop = min(start + self.seqlen, int(self._slot_lengths[number]))
            spans.append((number, start, stop))
        return spans

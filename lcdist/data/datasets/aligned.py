"""Datasets whose samples are placed by a `DocumentLayout`: aligned to blocks, with landmarks."""

import numpy as np
import torch

from lcdist.data.datasets.sample import Dataset, Sample
from lcdist.layout.documents import DocumentLayout


class AlignedDataset:
    """Samples of plain text, each laid out as one document; its documents are joined.

    seqlen: of the rows, in slots. Raises ValueError unless the inner samples fill just them.
    """

    def __init__(self, inner: Dataset, slots: DocumentLayout, seqlen: int) -> None:
        assert inner.seqlen == slots.num_text_slots(seqlen)
        self.inner, self.slots, self.seqlen = inner, slots, seqlen
        self.vocab_size, self.seed = inner.vocab_size, inner.seed

    def sample(self, index: int) -> Sample:
        """The sample with number `index`."""
        text = self.inner.sample(index).tokens
        row = self.slots.place(text[:-1], 0, self.seqlen, self.inner.seqlen)
        table = torch.tensor([0, self.seqlen], dtype=torch.int32)
        return Sample(torch.cat([row, text[-1:]]), table, closed=False)


class PackedSyntheticDataset:
    """Samples of plain text with their documents laid out one by one, cut to `seqlen` slots.

    What no longer fits is left out, so this is for made-up text alone, of which there is enough.
    """

    def __init__(self, inner: Dataset, slots: DocumentLayout) -> None:
        self.inner, self.slots, self.seqlen = inner, slots, inner.seqlen
        self.vocab_size, self.seed = inner.vocab_size, inner.seed

    def sample(self, index: int) -> Sample:
        """The sample with number `index`."""
        sample = self.inner.sample(index)
        ends = sample.cu_seqlens[1:].tolist()
        # The last label belongs to the last document, or begins another.
        ends = [*ends, len(sample.tokens)] if sample.closed else [*ends[:-1], len(sample.tokens)]
        rows, borders = [], [0]
        for start, end in zip([0, *ends], ends, strict=False):
            length = int(self.slots.length(np.array(end - start)))
            rows.append(self.slots.place(sample.tokens[start:end], 0, length, end - start))
            borders.append(borders[-1] + length)
        inside = [border for border in borders if border < self.seqlen]
        return Sample(
            tokens=torch.cat(rows)[: self.seqlen + 1],
            cu_seqlens=torch.tensor([*inside, self.seqlen], dtype=torch.int32),
            closed=self.seqlen in borders,
        )

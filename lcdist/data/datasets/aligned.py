"""Datasets that place samples of plain text by a `DocumentLayout`: aligned, with landmarks."""

import numpy as np
import torch

from lcdist.data.datasets.sample import Dataset, Sample
from lcdist.layout.documents import DocumentLayout


class AlignedDataset:
    """Place each sample of plain text as one document; the documents of a sample are joined.

    The inner samples must fill the text slots of a row exactly.

    Args:
        inner: dataset of plain text.
        document_layout: layout of the row.
        seqlen: slots per row.
    """

    def __init__(self, inner: Dataset, document_layout: DocumentLayout, seqlen: int) -> None:
        assert inner.seqlen == document_layout.num_text_slots(seqlen)
        self.inner, self.document_layout, self.seqlen = inner, document_layout, seqlen
        self.vocab_size, self.seed = inner.vocab_size, inner.seed

    def sample(self, index: int) -> Sample:
        """Return sample number `index`."""
        sample = self.inner.sample(index)
        text = sample.tokens
        row = self.document_layout.place(text[:-1], 0, self.seqlen, self.inner.seqlen)
        cu_seqlens = torch.tensor([0, self.seqlen], dtype=torch.int32)
        return Sample(torch.cat([row, text[-1:]]), cu_seqlens, False, sample.is_target)


class PackedSyntheticDataset:
    """Place the documents of each sample one by one and cut the row to `seqlen` slots.

    Text that does not fit is dropped, so use this for synthetic text only, which is unlimited.
    """

    def __init__(self, inner: Dataset, document_layout: DocumentLayout) -> None:
        self.inner, self.document_layout, self.seqlen = inner, document_layout, inner.seqlen
        self.vocab_size, self.seed = inner.vocab_size, inner.seed

    def sample(self, index: int) -> Sample:
        """Return sample number `index`."""
        sample, layout = self.inner.sample(index), self.document_layout
        ends = sample.cu_seqlens[1:].tolist()
        # The last label belongs to the last document, or starts another one.
        inner_ends = ends if sample.ends_document else ends[:-1]
        ends = [*inner_ends, len(sample.tokens)]
        rows, borders = [], [0]
        for start, end in zip([0, *ends], ends, strict=False):
            length = int(layout.length(np.array(end - start)))
            rows.append(layout.place(sample.tokens[start:end], 0, length, end - start))
            borders.append(borders[-1] + length)
        inner_borders = [border for border in borders if border < self.seqlen]
        return Sample(
            tokens=torch.cat(rows)[: self.seqlen + 1],
            cu_seqlens=torch.tensor([*inner_borders, self.seqlen], dtype=torch.int32),
            ends_document=self.seqlen in borders,
        )

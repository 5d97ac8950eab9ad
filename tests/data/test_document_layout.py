"""Rows with landmarks and aligned documents: every token once, and the right labels."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lcdist.data.datasets.aligned import AlignedDataset, PackedSyntheticDataset
from lcdist.data.datasets.sample import Sample
from lcdist.data.datasets.synthetic import SyntheticDataset
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.data.prepare.prepare import Prepared
from lcdist.layout import ContextLayout
from lcdist.layout.documents import PADDING, DocumentLayout

MARK = 999
LANDMARKS = DocumentLayout(multiple=4, block_size=4, landmark=MARK)
BLOCKS = DocumentLayout(multiple=5)
BOTH = DocumentLayout(multiple=6, block_size=4, landmark=MARK)


def document(tokens: int, document_layout: DocumentLayout) -> Tensor:
    return document_layout.place(
        torch.arange(tokens), 0, int(document_layout.length(np.array(tokens))), tokens
    )


def test_small_documents_are_placed_as_expected() -> None:
    pad = PADDING
    assert document(5, LANDMARKS).tolist() == [0, 1, 2, MARK, 3, 4, pad, MARK]
    assert document(6, LANDMARKS).tolist() == [0, 1, 2, MARK, 3, 4, 5, MARK]
    assert document(6, BLOCKS).tolist() == [0, 1, 2, 3, 4, 5, pad, pad, pad, pad]
    twelve = [0, 1, 2, MARK, 3, 4, pad, MARK, pad, pad, pad, pad]
    assert document(5, BOTH).tolist() == twelve
    assert document(7, DocumentLayout()).tolist() == list(range(7))


@pytest.mark.parametrize("document_layout", [DocumentLayout(), LANDMARKS, BLOCKS, BOTH])
def test_pieces_of_a_document_join_to_the_document(document_layout: DocumentLayout) -> None:
    for tokens in range(1, 20):
        whole = document(tokens, document_layout)
        assert whole[document_layout.is_text(whole)].tolist() == list(range(tokens))
        assert not len(whole) % document_layout.step
        assert len(whole) - document_layout.num_slots(tokens) < document_layout.step + (
            document_layout.block_size > 1
        )
        assert int(whole[document_layout.num_slots(tokens) - 1]) == tokens - 1
        for cut in range(len(whole)):
            before = min(document_layout.num_text_slots(cut), tokens)
            assert before == int(document_layout.is_text(whole[:cut]).sum())
            pieces = [
                document_layout.place(torch.arange(before), 0, cut, tokens),
                document_layout.place(torch.arange(before, tokens), cut, len(whole), tokens),
            ]
            assert torch.equal(torch.cat(pieces), whole)


class Texts:
    """Sample i has tokens 100 i, 100 i + 1, ...; documents end after 3, 4 and 9 tokens."""

    vocab_size, seed = 1000, 7

    def __init__(self, seqlen: int, ends_document: bool) -> None:
        self.seqlen, self.ends_document = seqlen, ends_document

    def sample(self, index: int) -> Sample:
        table = torch.tensor([0, 3, 4, 9, self.seqlen], dtype=torch.int32)
        return Sample(100 * index + torch.arange(self.seqlen + 1), table, self.ends_document)


def batch_of(
    dataset: object, document_layout: DocumentLayout, documents: str, cp_size: int = 1
) -> list[Tensor]:
    """Return unsharded [tokens, labels, mask] of the first row."""
    seqlen = -(-dataset.seqlen // (document_layout.step * cp_size)) * document_layout.step * cp_size
    layout = ContextLayout("contiguous", seqlen, cp_size)
    ranks = []
    for rank in range(cp_size):
        spec = LoaderSpec(layout, 0, 1, rank, 1, 1, documents, document_layout)  # type: ignore[arg-type]
        ranks.append(Loader(dataset, spec).next_step()[0])  # type: ignore[arg-type]
    names = ("tokens", "labels", "loss_mask")
    return [layout.unshard([getattr(b, n) for b in ranks], 1)[0] for n in names]


@pytest.mark.parametrize("cp_size", [1, 3])
def test_the_token_before_a_landmark_predicts_the_one_after_it(cp_size: int) -> None:
    dataset = AlignedDataset(Texts(8, ends_document=False), LANDMARKS, seqlen=10)
    tokens, labels, mask = batch_of(dataset, LANDMARKS, "join", cp_size)
    assert tokens[:10].tolist() == [0, 1, 2, MARK, 3, 4, 5, MARK, 6, 7]
    learned = mask.bool()
    assert learned.tolist()[:10] == [True] * 3 + [False] + [True] * 3 + [False] + [True] * 2
    assert not learned[10:].any()
    # Every text token predicts the next text token, also across landmarks and at the end.
    assert torch.equal(labels[learned], tokens[learned] + 1)


def test_no_document_predicts_the_next_one() -> None:
    for closed in (True, False):
        dataset = PackedSyntheticDataset(Texts(24, closed), LANDMARKS)
        tokens, labels, mask = batch_of(dataset, LANDMARKS, "pack")
        # Documents of 3, 1, 5 and 15 tokens in blocks of 4 slots; 24 slots are seen.
        text = [0, 1, 2, MARK, 3, 0, 0, MARK, 4, 5, 6, MARK, 7, 8, 0, MARK]
        text += [9, 10, 11, MARK, 12, 13, 14, MARK]
        assert tokens.tolist() == text
        learned = mask.bool()
        assert tokens[learned].tolist() == [0, 1, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]
        assert torch.equal(labels[learned], tokens[learned] + 1)
        table = dataset.sample(0).cu_seqlens
        assert table.tolist() == [0, 4, 8, 16, 24]


def test_synthetic_documents_begin_at_multiples() -> None:
    dataset = PackedSyntheticDataset(SyntheticDataset(50, 60, seed=3), BLOCKS)
    for index in range(20):
        sample = dataset.sample(index)
        assert len(sample.tokens) == 61 and not (sample.cu_seqlens % 5).any()
        assert int(sample.cu_seqlens[-1]) == 60
        for start, stop in pairwise(sample.cu_seqlens.tolist()):
            # Padding is only at the end of a document.
            text = BLOCKS.is_text(sample.tokens[start:stop]).int()
            assert text[0] and (text.diff() <= 0).all()


@pytest.mark.parametrize("document_layout", [LANDMARKS, BLOCKS, BOTH])
def test_an_epoch_of_a_folder_has_every_token_once(
    prepared: Prepared, document_layout: DocumentLayout
) -> None:
    plain = TokenDataset(prepared.folder, "train", 12, seed=5)
    seqlen = 2 * document_layout.step
    dataset = TokenDataset(prepared.folder, "train", seqlen, 5, document_layout)
    windows = -(-dataset.round_slots // seqlen)
    rows = [dataset.sample(i) for i in range(windows)]
    seen = torch.cat([row.tokens[:-1] for row in rows])
    texts = torch.bincount(seen[document_layout.is_text(seen)], minlength=MARK + 1)
    stored = torch.bincount(plain.window(0, plain.num_tokens), minlength=MARK + 1)
    # The last window continues into the next epoch.
    assert (texts >= stored).all()
    assert int((texts - stored).sum()) <= windows * seqlen - dataset.round_slots
    for row in rows:
        assert not (row.cu_seqlens % document_layout.step).any()
        if document_layout.landmark is not None:
            marks = (row.tokens[:-1] == MARK).nonzero().flatten()
            assert (marks % document_layout.block_size == document_layout.block_size - 1).all()


def test_a_row_that_begins_inside_a_block_raises(prepared: Prepared) -> None:
    with pytest.raises(ValueError, match=r"train\.seqlen = 13: .* multiple of 4; the next is 16"):
        TokenDataset(prepared.folder, "train", 13, 5, LANDMARKS)

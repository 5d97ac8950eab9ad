"""Best-fit packing: every document once, whole if it fits in a row; rows depend on the index."""

import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcdist.data.datasets.best_fit import best_fit
from lcdist.data.datasets.long_documents import LongDocuments
from lcdist.data.datasets.packed import PackedDataset
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.data.loader import Loader, LoaderSpec
from lcdist.layout import ContextLayout
from lcdist.layout.documents import PADDING, DocumentLayout
from tests.data.folders import token_folder
from tests.data.test_document_layout import BLOCKS, BOTH, LANDMARKS

LENGTHS = [7, 1, 30, 2, 19, 44, 10, 3, 3, 20, 5, 60, 21, 9]


def naive(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack by best fit decreasing, one item at a time."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fits = [row for row in rows if sum(row) + length <= capacity]
        if fits:
            max(fits, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(st.lists(st.integers(1, 23), max_size=80))
@settings(max_examples=300, deadline=None)
def test_packing_equals_naive_best_fit_decreasing(lengths: list[int]) -> None:
    found = best_fit(np.asarray(lengths, np.int64), 23)
    assert sorted(found.members.tolist()) == list(range(len(lengths)))
    rows = [sum(lengths[i] for i in found.members[a:b]) for a, b in pairwise(found.offsets)]
    # Rows with equal room are interchangeable, so only the fill of the rows is compared.
    assert sorted(rows) == sorted(map(sum, naive(lengths, 23)))


def test_many_documents_are_packed_fast_and_tightly() -> None:
    draw = np.random.default_rng(0)
    lengths = np.minimum(draw.lognormal(5, 1.5, 300_000).astype(np.int64) + 1, 4096)
    found = best_fit(lengths, 4096)
    filled = np.add.reduceat(lengths[found.members], found.offsets[:-1])
    assert filled.max() <= 4096 and filled.sum() == lengths.sum()
    # At most one row more than necessary.
    assert len(found) <= -(-lengths.sum() // 4096) + 1


@pytest.mark.parametrize("document_layout", [DocumentLayout(), LANDMARKS, BLOCKS, BOTH])
def test_an_epoch_has_every_token_once_and_whole_documents(
    document_layout: DocumentLayout, tmp_path: Path
) -> None:
    folder, seqlen = (
        token_folder(tmp_path / "a", LENGTHS),
        2 * document_layout.step + (document_layout.plain * 18),
    )
    data = PackedDataset(folder, "train", seqlen, 3, document_layout)
    slot_lengths = document_layout.length(np.asarray(LENGTHS)).tolist()
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    epochs = []
    for epoch in range(2):
        rows = [data.sample(epoch * data.num_rows + i) for i in range(data.num_rows)]
        seen: Counter[int] = Counter()
        whole = Counter()
        for row in rows:
            table = row.cu_seqlens.tolist()
            assert (table[0], table[-1], len(row.tokens)) == (0, seqlen, seqlen + 1)
            assert row.cu_seqlens.dtype == torch.int32
            for a, b in pairwise(table):
                piece = row.tokens[a:b]
                text = piece[document_layout.is_text(piece)].tolist()
                assert text == list(range(text[0], text[0] + len(text))) if text else True
                seen.update(text)
                if text and text[0] in starts and b - a == slot_lengths[starts.index(text[0])]:
                    whole[starts.index(text[0])] += 1
        assert seen == Counter(range(sum(LENGTHS)))
        assert set(whole) == {i for i, n in enumerate(slot_lengths) if n <= seqlen}
        epochs.append([row.tokens.tolist() for row in rows])
    # Every epoch has the same rows in another order.
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert data.num_cut_documents == sum(n > seqlen for n in slot_lengths)


def test_labels_stay_in_their_document_and_continue_in_its_next_row(tmp_path: Path) -> None:
    folder = token_folder(tmp_path / "a", LENGTHS)
    data = PackedDataset(folder, "train", 20, 3)
    layout = ContextLayout("contiguous", 24, 1)
    loader = Loader(data, LoaderSpec(layout, 0, 1, 0, 1, 1, "pack"))
    ends = {sum(LENGTHS[: i + 1]) - 1 for i in range(len(LENGTHS))}
    learned: Counter[int] = Counter()
    for number in range(data.num_rows):
        (batch,) = loader.next_step()
        row = data.sample(number)
        last = int(row.tokens[:-1][row.tokens[:-1] != PADDING][-1])
        assert row.ends_document == (last in ends)
        mask = batch.loss_mask[0].bool()
        assert torch.equal(batch.labels[0][mask], batch.tokens[0][mask] + 1)
        learned.update(batch.tokens[0][mask].tolist())
        assert batch.cu_seqlens is not None and int(batch.cu_seqlens[0][-1]) == 24
    # Every token except the last of each document predicts the next one, also across a cut.
    assert learned == Counter(set(range(sum(LENGTHS))) - ends)


def test_fewer_documents_are_cut_than_by_joining(tmp_path: Path) -> None:
    draw = random.Random(1)
    lengths = [draw.randrange(1, 64) for _ in range(300)]
    folder = token_folder(tmp_path / "a", lengths)
    joined, packed = TokenDataset(folder, "train", 64, 0), PackedDataset(folder, "train", 64, 0)
    pieces = [
        sum(len(data.sample(i).cu_seqlens) - 1 for i in range(count))
        for data, count in ((joined, joined.num_tokens // 64), (packed, packed.num_rows))
    ]
    padding = packed.num_rows * 64 - packed.num_tokens
    padded = sum(int(packed.sample(i).tokens[-2]) == PADDING for i in range(packed.num_rows))
    assert packed.num_cut_documents == 0 and pieces[1] - padded == 300
    assert pieces[0] > 400 and padding < 0.05 * packed.num_tokens


def test_a_row_is_a_function_of_seed_and_index(tmp_path: Path) -> None:
    folder = token_folder(tmp_path / "a", LENGTHS * 3)
    one, other, third = (PackedDataset(folder, "train", 20, seed) for seed in (5, 5, 6))
    order = [99, 3, 41, 0, 1000, 40]
    forward = {i: one.sample(i) for i in sorted(order)}
    for i in order:
        again = other.sample(i)
        assert (
            torch.equal(again.tokens, forward[i].tokens)
            and again.ends_document == forward[i].ends_document
        )
        assert torch.equal(other.cu_seqlens(i), forward[i].cu_seqlens)
    assert any(not torch.equal(third.sample(i).tokens, forward[i].tokens) for i in order)
    with pytest.raises(ValueError, match=r"train\.seqlen = 13: .* multiple of 4; the next is 16"):
        PackedDataset(folder, "train", 13, 5, LANDMARKS)
    long = PackedDataset(folder, "train", 20, 5, long_documents=LongDocuments((20,), (2.0,)))
    tokens = torch.cat([long.sample(i).tokens[:-1] for i in range(long.num_rows)])
    counts = torch.bincount(tokens[tokens != PADDING], minlength=sum(LENGTHS) * 3)
    assert counts.tolist() == [1 + (n >= 20) for n in LENGTHS * 3 for _ in range(n)]

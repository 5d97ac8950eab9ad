"""Samples of a step assigned by work: the same samples, equally many per rank, less waiting."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcdist.data.balance import assign_by_work, attention_work, sample_cu_seqlens
from lcdist.data.datasets.packed import PackedDataset
from lcdist.data.datasets.synthetic import SyntheticDataset
from lcdist.data.datasets.tokens import TokenDataset
from lcdist.data.loader import Batch, Loader, LoaderSpec
from lcdist.layout import ContextLayout
from tests.data.folders import token_folder

SEQLEN, BATCH = 128, 24


@pytest.fixture
def skewed(tmp_path: Path) -> Path:
    """Make a folder of many short documents and a few that fill rows, as in real text."""
    draw = random.Random(0)
    lengths = [draw.choice([3, 5, 9, 14]) for _ in range(600)] + [700, 900, 400]
    draw.shuffle(lengths)
    return token_folder(tmp_path / "skewed", lengths)


def step(dataset, dp_size: int, balance: bool, sample: int = 0, size: int = 2) -> list[list[Batch]]:
    layout = ContextLayout("contiguous", SEQLEN, 1)
    return [
        Loader(
            dataset, LoaderSpec(layout, rank, dp_size, 0, size, BATCH, "pack", balance=balance)
        ).step_at(sample)
        for rank in range(dp_size)
    ]


def works(ranks: list[list[Batch]]) -> list[int]:
    return [
        sum(attention_work(t) for batch in rank for t in batch.cu_seqlens or ()) for rank in ranks
    ]


def rows_of(ranks: list[list[Batch]]) -> list[list[int]]:
    return sorted(row for rank in ranks for batch in rank for row in batch.tokens.tolist())


@pytest.mark.parametrize(
    ("dataset_class", "dp_size"), [(TokenDataset, 3), (PackedDataset, 2), (PackedDataset, 4)]
)
def test_balance_keeps_the_samples_and_reduces_waiting(
    dataset_class: type, dp_size: int, skewed: Path
) -> None:
    dataset = dataset_class(skewed, "train", SEQLEN, 3)
    waits = {False: 0.0, True: 0.0}
    for sample in range(0, 10 * BATCH, BATCH):
        before, after = (step(dataset, dp_size, balance, sample) for balance in (False, True))
        assert rows_of(after) == rows_of(before)
        assert {len(rank) for rank in after} == {BATCH // dp_size // 2}
        for balance, ranks in ((False, before), (True, after)):
            rank_works = works(ranks)
            waits[balance] += max(rank_works) / (sum(rank_works) / dp_size) - 1
    # Excess of the slowest rank over the mean, summed over ten steps. A row cannot be divided, so
    # some of it remains.
    assert waits[True] < waits[False] / 3


def test_balance_keeps_the_order_of_one_rank_and_resumes(skewed: Path) -> None:
    dataset = PackedDataset(skewed, "train", SEQLEN, 3)
    for one, other in zip(step(dataset, 1, False)[0], step(dataset, 1, True)[0], strict=True):
        assert torch.equal(one.tokens, other.tokens)
    layout = ContextLayout("contiguous", SEQLEN, 1)
    spec = LoaderSpec(layout, 1, 3, 0, 4, BATCH, "pack", balance=True)
    through, resumed = (Loader(PackedDataset(skewed, "train", SEQLEN, 3), spec) for _ in range(2))
    for _ in range(3):
        through.next_step()
    resumed.load_state_dict(through.state_dict())
    for one, other in zip(through.next_step(), resumed.next_step(), strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.loss_mask, other.loss_mask)


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_every_item_is_assigned_once_and_ranks_get_equally_many(
    num_ranks: int, per_rank: int, data: st.DataObject
) -> None:
    given_works = data.draw(
        st.lists(st.integers(0, 100), min_size=num_ranks * per_rank, max_size=num_ranks * per_rank)
    )
    assigned = assign_by_work(given_works, num_ranks)
    assert sorted(i for items in assigned for i in items) == list(range(num_ranks * per_rank))
    assert all(len(items) == per_rank and items == sorted(items) for items in assigned)
    assert len(assigned) == num_ranks


def test_work_is_computed_without_reading_tokens(skewed: Path, monkeypatch) -> None:
    assert attention_work(torch.tensor([0, 3, 4, 10], dtype=torch.int32)) == 9 + 1 + 36
    long = torch.tensor([0, 2**20], dtype=torch.int32)
    assert attention_work(long) == 2**40
    assert assign_by_work([9, 1, 8, 2, 1, 1], 2) == [[0, 1, 4], [2, 3, 5]]
    synthetic = SyntheticDataset(50, 64, 1)
    assert torch.equal(sample_cu_seqlens(synthetic, 5), synthetic.sample(5).cu_seqlens)
    dataset = TokenDataset(skewed, "train", SEQLEN, 3)
    expected = dataset.sample(9).cu_seqlens

    def refuse(*_: object) -> None:
        raise AssertionError("cu_seqlens needs no tokens")

    monkeypatch.setattr(dataset, "_read", refuse)
    assert torch.equal(sample_cu_seqlens(dataset, 9), expected)

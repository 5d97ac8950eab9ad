"""A step's samples dealt by work: the same samples, equally many each, and less to wait for."""

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
    """Many short documents and a few that fill rows, as text has them."""
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


@pytest.mark.parametrize("kind", [TokenDataset, PackedDataset])
@pytest.mark.parametrize("dp_size", [2, 3, 4])
def test_the_same_samples_and_less_waiting(kind: type, dp_size: int, skewed: Path) -> None:
    dataset = kind(skewed, "train", SEQLEN, 3)
    waits = {False: 0.0, True: 0.0}
    for sample in range(0, 10 * BATCH, BATCH):
        before, after = (step(dataset, dp_size, balance, sample) for balance in (False, True))
        assert rows_of(after) == rows_of(before)
        assert {len(rank) for rank in after} == {BATCH // dp_size // 2}
        for balance, ranks in ((False, before), (True, after)):
            done = works(ranks)
            waits[balance] += max(done) / (sum(done) / dp_size) - 1
    # How much longer than the mean the slowest rank computes, summed over ten steps; a row cannot
    # be divided, so some of it stays.
    assert waits[True] < waits[False] / 3


def test_one_rank_keeps_its_order_and_resumes_anywhere(skewed: Path) -> None:
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
def test_everyone_gets_equally_many_and_each_is_dealt_once(
    ranks: int, each: int, data: st.DataObject
) -> None:
    given_works = data.draw(
        st.lists(st.integers(0, 100), min_size=ranks * each, max_size=ranks * each)
    )
    hands = assign_by_work(given_works, ranks)
    assert sorted(place for hand in hands for place in hand) == list(range(ranks * each))
    assert all(len(hand) == each and hand == sorted(hand) for hand in hands)
    assert len(hands) == ranks


def test_work_by_hand_and_tables_without_tokens(skewed: Path, monkeypatch) -> None:
    assert attention_work(torch.tensor([0, 3, 4, 10], dtype=torch.int32)) == 9 + 1 + 36
    long = torch.tensor([0, 2**20], dtype=torch.int32)
    assert attention_work(long) == 2**40
    assert assign_by_work([9, 1, 8, 2, 1, 1], 2) == [[0, 1, 4], [2, 3, 5]]
    made_up = SyntheticDataset(50, 64, 1)
    assert torch.equal(sample_cu_seqlens(made_up, 5), made_up.sample(5).cu_seqlens)
    dataset = TokenDataset(skewed, "train", SEQLEN, 3)
    expected = dataset.sample(9).cu_seqlens

    def refuse(*_: object) -> None:
        raise AssertionError("a table needs no tokens")

    monkeypatch.setattr(dataset, "_read", refuse)
    assert torch.equal(sample_cu_seqlens(dataset, 9), expected)

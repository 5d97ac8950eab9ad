"""Loader: samples of each rank, labels at shard borders, packed masks, resuming."""

from dataclasses import replace

import pytest
import torch

from lcdist.data.datasets.sample import Sample
from lcdist.data.datasets.synthetic import SyntheticDataset
from lcdist.data.loader import Batch, Loader, LoaderSpec
from lcdist.layout import KINDS, ContextLayout


class Counted:
    """Sample i has tokens 1000 i, 1000 i + 1, ...; documents end after 3, 4 and 9 tokens."""

    vocab_size, seed = 10**6, 7

    def __init__(self, seqlen: int = 12, ends_document: bool = False) -> None:
        self.seqlen, self.ends_document = seqlen, ends_document

    def sample(self, index: int) -> Sample:
        table = torch.tensor([0, 3, 4, 9, self.seqlen], dtype=torch.int32)
        return Sample(1000 * index + torch.arange(self.seqlen + 1), table, self.ends_document)


def spec(kind: str = "contiguous", seqlen: int = 12, cp_size: int = 1, **values) -> LoaderSpec:
    given = {"dp_rank": 0, "dp_size": 1, "cp_rank": 0, "micro_batch_size": 2}
    given |= {"global_batch_size": 4, "documents": "join"} | values
    return LoaderSpec(ContextLayout(kind, seqlen, cp_size), **given)


def whole(shards: list[Batch], layout: ContextLayout, name: str) -> torch.Tensor:
    return layout.unshard([getattr(shard, name) for shard in shards], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("documents", ["join", "pack"])
def test_labels_follow_tokens_across_shard_borders(kind: str, cp_size: int, documents: str) -> None:
    ranks = [spec(kind, 12, cp_size, cp_rank=r, documents=documents) for r in range(cp_size)]
    steps = [Loader(Counted(), rank).next_step() for rank in ranks]
    for micro in range(2):
        shards = [step[micro] for step in steps]
        for rank, shard in enumerate(shards):
            positions = ranks[0].layout.positions(rank)
            assert shard.tokens.tolist() == [
                (1000 * (2 * micro + row) + positions).tolist() for row in range(2)
            ]
            assert torch.equal(shard.labels, shard.tokens + 1)
            assert shard.tokens.dtype == shard.labels.dtype == torch.int64
            assert shard.loss_mask.dtype == torch.float32
        mask = whole(shards, ranks[0].layout, "loss_mask")
        masked = (mask == 0).nonzero()[:, 1].tolist()
        assert masked == ([] if documents == "join" else [2, 3, 8, 2, 3, 8])
        for shard in shards:
            if documents == "join":
                assert shard.cu_seqlens is None
            else:
                assert shard.cu_seqlens is not None
                assert [table.tolist() for table in shard.cu_seqlens] == [[0, 3, 4, 9, 12]] * 2


@pytest.mark.parametrize("closed", [False, True])
def test_a_packed_row_that_ends_with_its_document_has_no_last_label(closed: bool) -> None:
    batch = Loader(Counted(ends_document=closed), spec(documents="pack")).next_step()[0]
    assert batch.loss_mask[:, -1].tolist() == [0.0 if closed else 1.0] * 2
    joined = Loader(Counted(ends_document=closed), spec()).next_step()[0]
    assert bool((joined.loss_mask == 1).all())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_masked_and_a_document_of_its_own(kind: str) -> None:
    ranks = [spec(kind, 16, 2, cp_rank=r, documents="pack") for r in range(2)]
    shards = [Loader(Counted(), rank).next_step()[0] for rank in ranks]
    layout = ranks[0].layout
    tokens, labels = (whole(shards, layout, name) for name in ("tokens", "labels"))
    assert tokens[1].tolist() == [*range(1000, 1012), 0, 0, 0, 0]
    assert labels[1].tolist() == [*range(1001, 1013), 0, 0, 0, 0]
    assert (
        whole(shards, layout, "loss_mask")[0].tolist()
        == [1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 1, 1] + [0] * 4
    )
    assert shards[1].cu_seqlens is not None
    assert shards[1].cu_seqlens[0].tolist() == [0, 3, 4, 9, 12, 16]
    assert shards[1].cu_seqlens[0].dtype == torch.int32
    joined = [Loader(Counted(), replace(rank, documents="join")).next_step()[0] for rank in ranks]
    assert joined[0].cu_seqlens is None
    assert whole(joined, layout, "loss_mask")[0].tolist() == [1] * 12 + [0] * 4


def test_dp_ranks_are_disjoint_and_cover_the_step() -> None:
    for dp_size, micro_batch_size in ((1, 1), (2, 2), (3, 4), (4, 1), (12, 1)):
        drawn: list[list[int]] = [[], []]
        for dp_rank in range(dp_size):
            mine = spec(
                dp_rank=dp_rank,
                dp_size=dp_size,
                micro_batch_size=micro_batch_size,
                global_batch_size=12,
            )
            loader = Loader(Counted(), mine)
            for step in drawn:
                batches = loader.next_step()
                assert len(batches) == mine.num_micro_batches
                step += [int(row[0]) // 1000 for batch in batches for row in batch.tokens]
        assert [sorted(step) for step in drawn] == [list(range(12)), list(range(12, 24))]


def test_micro_batches_use_samples_in_the_documented_order() -> None:
    loader = Loader(Counted(), spec(dp_rank=1, dp_size=2, global_batch_size=8))
    drawn = [[int(row[0]) // 1000 for row in batch.tokens] for batch in loader.step_at(40)]
    assert drawn == [[42, 43], [46, 47]]


def test_resuming_at_a_sample_equals_running_to_it() -> None:
    data = SyntheticDataset(50, 12, seed=3)
    through = Loader(data, spec())
    for _ in range(3):
        through.next_step()
    state = through.state_dict()
    assert state == {"seed": 3, "sample": 12}
    # Another mesh and another batch size can continue from the same state.
    halves = [
        Loader(SyntheticDataset(50, 12, seed=3), spec(dp_rank=r, dp_size=2, global_batch_size=8))
        for r in range(2)
    ]
    for half in halves:
        half.load_state_dict(state)
    expected = [batch.tokens for _ in range(2) for batch in through.next_step()]
    first, second = (half.next_step() for half in halves)
    found = [batch.tokens for pair in zip(first, second, strict=True) for batch in pair]
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_a_state_of_another_seed_raises() -> None:
    loader = Loader(Counted(), spec())
    with pytest.raises(ValueError, match="seed = 3, this run train.seed = 7: set train.seed = 3"):
        loader.load_state_dict({"seed": 3, "sample": 12})
    assert loader.sample == 0


def test_sizes_that_do_not_fit_raise() -> None:
    with pytest.raises(ValueError, match="global_batch_size = 6: .* 2 x 2 = 4"):
        spec(dp_size=2, global_batch_size=6)
    with pytest.raises(ValueError, match="samples have 12 tokens, but the layout's rows only 8"):
        Loader(Counted(), spec(seqlen=8))
    with pytest.raises(ValueError, match="data.documents = 'mix': must be 'join' or 'pack'"):
        spec(documents="mix")

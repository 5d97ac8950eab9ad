"""ContextLayout: properties for every kind and cp 1 to 8, small examples, and errors."""

import re
from math import lcm

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lcdist.layout import KINDS, ContextLayout, pieces_needed


@st.composite
def layouts(draw: st.DrawFn) -> ContextLayout:
    kind, cp_size = draw(st.sampled_from(KINDS)), draw(st.integers(1, 8))
    multiple_of = draw(st.integers(1, 12))
    step = lcm(pieces_needed(kind, cp_size), multiple_of)
    return ContextLayout(kind, step * draw(st.integers(1, 3)), cp_size, multiple_of)


@st.composite
def borders(draw: st.DrawFn) -> tuple[ContextLayout, torch.Tensor]:
    layout = draw(layouts())
    inner = draw(st.lists(st.integers(0, layout.seqlen), max_size=5))
    return layout, torch.tensor([0, *sorted(inner), layout.seqlen], dtype=torch.int32)


@given(layouts(), st.integers(0, 2))
def test_unshard_after_shard_is_the_identity(layout, dim):
    shape = [2, 3, 4]
    shape[dim] = layout.seqlen
    x = torch.randn(shape)
    for d in (dim, dim - 3):
        shards = [layout.shard(x, rank, d) for rank in range(layout.cp_size)]
        assert torch.equal(layout.unshard(shards, d), x)


@given(layouts())
def test_positions_are_a_partition(layout):
    positions = [layout.positions(rank) for rank in range(layout.cp_size)]
    assert torch.equal(torch.cat(positions).sort().values, torch.arange(layout.seqlen))
    assert all(p.dtype == torch.int64 for p in positions)


@given(layouts())
def test_all_ranks_hold_equally_many_tokens(layout):
    assert layout.local_seqlen * layout.cp_size == layout.seqlen
    for rank in range(layout.cp_size):
        assert layout.positions(rank).shape == (layout.local_seqlen,)


@given(layouts())
def test_positions_increase(layout):
    for rank in range(layout.cp_size):
        assert (layout.positions(rank).diff() > 0).all()


@given(st.sampled_from(KINDS), st.integers(1, 40))
def test_one_rank_holds_everything_in_order(kind, seqlen):
    layout = ContextLayout(kind, seqlen, cp_size=1)
    assert torch.equal(layout.positions(0), torch.arange(seqlen))


@given(layouts())
def test_shard_selects_positions(layout):
    x = torch.arange(layout.seqlen)
    for rank in range(layout.cp_size):
        assert torch.equal(layout.shard(x, rank, 0), layout.positions(rank))


@given(layouts())
def test_zigzag_and_striped_share_causal_work(layout):
    """The sum of positions is the work of causal attention: with zigzag equal on all ranks."""
    work = [int(layout.positions(rank).sum()) for rank in range(layout.cp_size)]
    spread = {"zigzag": 0, "striped": layout.seqlen, "contiguous": layout.seqlen**2}
    assert max(work) - min(work) <= spread[layout.kind]


@given(borders())
def test_local_borders_count_the_tokens_before_them(case):
    layout, cu_seqlens = case
    total = torch.zeros_like(cu_seqlens)
    for rank in range(layout.cp_size):
        local = layout.local_cu_seqlens(cu_seqlens, rank)
        positions = layout.positions(rank)
        assert local.dtype == torch.int32 and len(local) == len(cu_seqlens)
        assert local.tolist() == [int((positions < b).sum()) for b in cu_seqlens]
        assert local[0] == 0 and local[-1] == layout.local_seqlen
        # Every token of document i lies between local borders i and i + 1.
        documents = torch.repeat_interleave(torch.arange(len(local) - 1), local.diff())
        ends = cu_seqlens[1:].to(torch.int64)
        assert torch.equal(documents, torch.searchsorted(ends, positions, right=True))
        total += local
    assert torch.equal(total, cu_seqlens)


@given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(1, 12), st.integers(1, 200))
@settings(max_examples=200)
def test_seqlen_that_does_not_fit_is_rejected_with_one_that_fits(
    kind, cp_size, multiple_of, seqlen
):
    step = lcm(pieces_needed(kind, cp_size), multiple_of)
    if seqlen % step == 0:
        assert ContextLayout(kind, seqlen, cp_size, multiple_of).seqlen == seqlen
        return
    with pytest.raises(ValueError, match=f"seqlen = {seqlen} does not fit a {kind}") as caught:
        ContextLayout(kind, seqlen, cp_size, multiple_of)
    remedy = re.search(r"multiple of (\d+); the next one is (\d+)", str(caught.value))
    assert remedy is not None and int(remedy[1]) == step
    assert seqlen < int(remedy[2]) < seqlen + step
    ContextLayout(kind, int(remedy[2]), cp_size, multiple_of)


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("contiguous", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("zigzag", [[0, 7], [1, 6], [2, 5], [3, 4]]),
        ("striped", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_eight_tokens_on_four_ranks(kind, held):
    layout = ContextLayout(kind, 8, cp_size=4)
    assert layout.local_seqlen == 2
    assert [layout.positions(rank).tolist() for rank in range(4)] == held
    x = torch.arange(100, 108)
    assert [layout.shard(x, rank, 0).tolist() for rank in range(4)] == [
        [100 + p for p in positions] for positions in held
    ]


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]]),
        ("striped", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_eight_tokens_on_two_ranks(kind, held):
    layout = ContextLayout(kind, 8, cp_size=2)
    assert [layout.positions(rank).tolist() for rank in range(2)] == held


def test_local_borders_of_a_small_example():
    layout = ContextLayout("zigzag", 8, cp_size=2)
    cu_seqlens = torch.tensor([0, 3, 3, 7, 8], dtype=torch.int32)
    # Rank 0 holds 0 1 | 6 | 7, rank 1 holds 2 | 3 4 5.
    assert layout.local_cu_seqlens(cu_seqlens, 0).tolist() == [0, 2, 2, 3, 4]
    assert layout.local_cu_seqlens(cu_seqlens, 1).tolist() == [0, 1, 1, 4, 4]


def test_shard_is_differentiable():
    layout = ContextLayout("zigzag", 8, cp_size=2)
    x = torch.zeros(8, requires_grad=True)
    layout.shard(x, 1, 0).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


def test_errors_name_the_values():
    with pytest.raises(ValueError, match="layout kind 'zickzack': must be one of contiguous, zig"):
        ContextLayout("zickzack", 8, 2)
    with pytest.raises(ValueError, match="cp_size = 0, multiple_of = 1: both must be >= 1"):
        ContextLayout("zigzag", 8, 0)
    with pytest.raises(ValueError, match="multiple_of = -2"):
        ContextLayout("zigzag", 8, 2, -2)
    with pytest.raises(ValueError, match="seqlen = 0 does not fit .* the next one is 4"):
        ContextLayout("zigzag", 0, 2)
    with pytest.raises(ValueError, match="seqlen = -8 does not fit .* the next one is 4"):
        ContextLayout("zigzag", -8, 2)
    layout = ContextLayout("zigzag", 8, 2)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=rf"rank {rank}: must be in 0\.\.1"):
            layout.positions(rank)
    with pytest.raises(ValueError, match=r"dim 1 of a tensor of shape \(8, 4\) has 4 entries; "):
        layout.shard(torch.zeros(8, 4), 0, 1)
    with pytest.raises(ValueError, match="3 shards: expected cp_size = 2"):
        layout.unshard([torch.zeros(4)] * 3, 0)
    with pytest.raises(ValueError, match="the shards have 6 entries: expected 8"):
        layout.unshard([torch.zeros(3)] * 2, 0)


def test_layout_is_immutable_and_compares_by_value():
    layout = ContextLayout("zigzag", 8, 2)
    with pytest.raises(AttributeError):
        layout.seqlen = 16  # pyright: ignore[reportAttributeAccessIssue]
    assert layout == ContextLayout("zigzag", 8, 2) and hash(layout) == hash(
        ContextLayout("zigzag", 8, 2, multiple_of=1)
    )

"""ring and ring_with_gradients: order, kept blocks, order of posting, gradients."""

import weakref

import pytest
import torch
from torch import Tensor

from lcdist.exchange import Group, VirtualGroup, group_rank, ring, ring_with_gradients
from tests.tolerance import assert_matches


def test_ring_visits_own_block_first_then_lower_ranks():
    def owners(rank):
        return [(owner, block.item()) for owner, block in ring(torch.tensor(rank.rank()), rank)]

    visits = VirtualGroup(4).run(owners)
    assert visits[0] == [(0, 0), (3, 3), (2, 2), (1, 1)]
    assert visits[2] == [(2, 2), (1, 1), (0, 0), (3, 3)]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_next_hop_is_posted_before_each_yield(needs_grad):
    # One thread runs both ranks: a hop posted too late would wait for itself.
    group = VirtualGroup(2)
    laps = [ring(torch.ones(3, requires_grad=needs_grad), group[r]) for r in range(2)]
    assert [next(lap)[0] for lap in laps] == [0, 1]
    assert [next(lap)[0] for lap in laps] == [1, 0]


def test_without_gradients_visited_blocks_are_freed():
    def alive_at_each_visit(rank):
        x = torch.ones(3, requires_grad=True)
        seen, alive = [], []
        with torch.no_grad():
            for _, block in ring(x, rank):
                seen.append(weakref.ref(block))
                alive.append(sum(ref() is not None and ref() is not x for ref in seen))
                del block
        return alive

    assert VirtualGroup(5).run(alive_at_each_visit) == [[0, 1, 1, 1, 1]] * 5


def test_lap_is_one_autograd_node():
    def nodes(rank):
        x = torch.ones(3, requires_grad=True)
        return len({block.grad_fn for _, block in ring(x, rank)})

    assert VirtualGroup(3).run(nodes) == [1, 1, 1]


def _weights(owner: int, visitor: int) -> Tensor:
    g = torch.Generator().manual_seed(17 * owner + visitor)
    return torch.randn(2, 4, 3, dtype=torch.float64, generator=g)


def block_of(owner: int) -> Tensor:
    return _weights(owner, 100).transpose(0, 1)


def _loss(block: Tensor, owner: int, visitor: int) -> Tensor:
    return torch.sin(block.transpose(0, 1) * _weights(owner, visitor)).sum()


def _skips(owner: int, visitor: int) -> bool:
    return owner > visitor


def gradient_by_autograd(group: Group) -> Tensor:
    rank = group_rank(group)
    x = block_of(rank).requires_grad_()
    loss = x.new_zeros(())
    for owner, block in ring(x, group):
        if not _skips(owner, rank):
            loss = loss + _loss(block, owner, rank)
    loss.backward()
    assert x.grad is not None
    return x.grad


def gradient_by_hand(group: Group) -> Tensor:
    rank = group_rank(group)
    lap = ring_with_gradients(block_of(rank), group)
    for visit in lap:
        if not _skips(visit.owner, rank):
            with torch.enable_grad():
                block = visit.block.detach().requires_grad_()
                (grad,) = torch.autograd.grad(_loss(block, visit.owner, rank), block)
            visit.add_gradient(grad)
            grad.fill_(float("nan"))
    return lap.result()


def dense_gradients(n: int) -> list[Tensor]:
    blocks = [block_of(owner).requires_grad_() for owner in range(n)]
    losses = [
        _loss(blocks[owner], owner, visitor)
        for owner in range(n)
        for visitor in range(n)
        if not _skips(owner, visitor)
    ]
    return list(torch.autograd.grad(torch.stack(losses).sum(), blocks))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ring_gradients_equal_one_process(n):
    for gradient in (gradient_by_autograd, gradient_by_hand):
        for grad, reference in zip(VirtualGroup(n).run(gradient), dense_gradients(n), strict=True):
            assert_matches(grad, reference)


def test_ring_with_gradients_sums_bfloat16_in_float32():
    def result(rank):
        lap = ring_with_gradients(torch.ones(3, dtype=torch.bfloat16), rank)
        for visit in lap:
            assert visit.block.dtype == torch.bfloat16
            # 256 + 1 is not a bfloat16.
            visit.add_gradient(torch.full((3,), 256.0 if visit.owner == rank.rank() else 1.0))
        return lap.result()

    for total in VirtualGroup(3).run(result):
        assert total.dtype == torch.float32
        assert total.tolist() == [258.0] * 3


def test_ring_sums_bfloat16_gradients_in_float32():
    def grad(rank):
        x = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
        # The farthest visitor adds first: 256 + 1 is not a bfloat16.
        scale = {0: 1.0, 1: 1.0, 2: 256.0}
        losses = [b.sum() * scale[(rank.rank() - o) % 3] for o, b in ring(x, rank)]
        torch.stack(losses).sum().backward()
        return x.grad

    for total in VirtualGroup(3).run(grad):
        assert total.dtype == torch.bfloat16
        assert total.tolist() == [258.0] * 3


def test_ring_with_gradients_posts_the_next_block_before_the_visit():
    group = VirtualGroup(2)
    laps = [ring_with_gradients(torch.ones(3), group[r]) for r in range(2)]
    visits = [iter(lap) for lap in laps]
    for expected in ([0, 1], [1, 0]):
        current = [next(visit) for visit in visits]
        assert [visit.owner for visit in current] == expected
        for visit in current:
            visit.add_gradient(visit.block)
    for lap, visit in zip(laps, visits, strict=True):
        assert next(visit, None) is None
        assert lap.result().tolist() == [2.0] * 3


def test_ring_with_gradients_refuses_wrong_use():
    lap = ring_with_gradients(torch.ones(3), None)
    with pytest.raises(AssertionError, match="not finished"):
        lap.result()
    visit = next(iter(lap))
    with pytest.raises(AssertionError, match="not of the block's shape"):
        visit.add_gradient(torch.ones(4))
    visit.add_gradient(torch.ones(3))
    with pytest.raises(AssertionError, match="one gradient"):
        visit.add_gradient(torch.ones(3))
    with pytest.raises(AssertionError, match="once"):
        next(iter(lap))

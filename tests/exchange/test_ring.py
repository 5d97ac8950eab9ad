"""ring and ring_with_gradients: order, what is held, when messages are posted, gradients."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lcdist.exchange import Group, VirtualGroup, group_rank, group_size, ring, ring_with_gradients
from tests.distributed import run_ranks
from tests.tolerance import assert_matches


def test_owners_come_own_first_then_downwards():
    def owners(rank):
        return [(owner, block.item()) for owner, block in ring(torch.tensor(rank.rank()), rank)]

    visits = VirtualGroup(4).run(owners)
    assert visits[0] == [(0, 0), (3, 3), (2, 2), (1, 1)]
    assert visits[2] == [(2, 2), (1, 1), (0, 0), (3, 3)]


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_next_hop_is_posted_before_each_yield(needs_grad):
    # One thread plays both ranks: whoever posted too late would wait for itself.
    group = VirtualGroup(2)
    laps = [ring(torch.ones(3, requires_grad=needs_grad), group[r]) for r in range(2)]
    assert [next(lap)[0] for lap in laps] == [0, 1]
    assert [next(lap)[0] for lap in laps] == [1, 0]


def test_without_gradients_a_passed_block_is_let_go():
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


def test_the_lap_is_one_node():
    def nodes(rank):
        x = torch.ones(3, requires_grad=True)
        return len({block.grad_fn for _, block in ring(x, rank)})

    assert VirtualGroup(3).run(nodes) == [1, 1, 1]


def _weights(owner: int, visitor: int) -> Tensor:
    g = torch.Generator().manual_seed(17 * owner + visitor)
    return torch.randn(2, 4, 3, dtype=torch.float64, generator=g)


def _block(owner: int) -> Tensor:
    return _weights(owner, 100).transpose(0, 1)


def _use(block: Tensor, owner: int, visitor: int) -> Tensor:
    return torch.sin(block.transpose(0, 1) * _weights(owner, visitor)).sum()


def _skips(owner: int, visitor: int) -> bool:
    return owner > visitor


def _by_autograd(group: Group) -> Tensor:
    me = group_rank(group)
    x = _block(me).requires_grad_()
    loss = x.new_zeros(())
    for owner, block in ring(x, group):
        if not _skips(owner, me):
            loss = loss + _use(block, owner, me)
    loss.backward()
    assert x.grad is not None
    return x.grad


def _by_hand(group: Group) -> Tensor:
    me = group_rank(group)
    lap = ring_with_gradients(_block(me), group)
    for visit in lap:
        if not _skips(visit.owner, me):
            with torch.enable_grad():
                block = visit.block.detach().requires_grad_()
                (grad,) = torch.autograd.grad(_use(block, visit.owner, me), block)
            visit.add(grad)
            grad.fill_(float("nan"))
    return lap.home()


def _dense(n: int) -> list[Tensor]:
    blocks = [_block(owner).requires_grad_() for owner in range(n)]
    uses = [
        _use(blocks[owner], owner, visitor)
        for owner in range(n)
        for visitor in range(n)
        if not _skips(owner, visitor)
    ]
    return list(torch.autograd.grad(torch.stack(uses).sum(), blocks))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_gradients_come_home_as_in_one_process(n):
    for way in (_by_autograd, _by_hand):
        for grad, reference in zip(VirtualGroup(n).run(way), _dense(n), strict=True):
            assert_matches(grad, reference)


def _both_ways(rank: int, n: int) -> list[Tensor]:
    group = dist.group.WORLD
    # Two laps at once: their messages must not be taken for one another's.
    first, second = (
        ring_with_gradients(_block(rank), group),
        ring_with_gradients(2 * _block(rank), group),
    )
    for one, two in zip(first, second, strict=True):
        assert torch.equal(2 * one.block, two.block)
        one.add(one.block)
        two.add(two.block)
    assert group_size(group) == n
    return [_by_hand(group), _by_autograd(group), first.home(), second.home()]


def test_gradients_come_home_on_gloo():
    results = run_ranks(_both_ways, 4)
    for rank, (by_hand, by_autograd, first, second) in enumerate(results):
        assert_matches(by_hand, _dense(4)[rank])
        assert_matches(by_autograd, _dense(4)[rank])
        assert_matches(first, 4 * _block(rank))
        assert_matches(second, 8 * _block(rank))


def test_home_is_summed_in_float32_for_bfloat16():
    def home(rank):
        lap = ring_with_gradients(torch.ones(3, dtype=torch.bfloat16), rank)
        for visit in lap:
            assert visit.block.dtype == torch.bfloat16
            # 256 + 1 is not a bfloat16.
            visit.add(torch.full((3,), 256.0 if visit.owner == rank.rank() else 1.0))
        return lap.home()

    for total in VirtualGroup(3).run(home):
        assert total.dtype == torch.float32
        assert total.tolist() == [258.0] * 3


def test_the_ring_sums_in_float32_for_bfloat16_too():
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


def test_ring_home_posts_the_next_block_before_the_visit():
    group = VirtualGroup(2)
    laps = [ring_with_gradients(torch.ones(3), group[r]) for r in range(2)]
    visits = [iter(lap) for lap in laps]
    for expected in ([0, 1], [1, 0]):
        here = [next(visit) for visit in visits]
        assert [visit.owner for visit in here] == expected
        for visit in here:
            visit.add(visit.block)
    for lap, visit in zip(laps, visits, strict=True):
        assert next(visit, None) is None
        assert lap.home().tolist() == [2.0] * 3


def test_ring_home_refuses_wrong_use():
    lap = ring_with_gradients(torch.ones(3), None)
    with pytest.raises(AssertionError, match="not finished"):
        lap.home()
    visit = next(iter(lap))
    with pytest.raises(AssertionError, match="not of the block's shape"):
        visit.add(torch.ones(4))
    visit.add(torch.ones(3))
    with pytest.raises(AssertionError, match="one gradient"):
        visit.add(torch.ones(3))
    with pytest.raises(AssertionError, match="once"):
        next(iter(lap))

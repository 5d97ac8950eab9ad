"""Virtual ranks: messages are copies, failures stop all ranks, 64 ranks work."""

import threading

import pytest
import torch

from lcdist.exchange import (
    VirtualGroup,
    VirtualGroupAborted,
    gather,
    ring,
    ring_with_gradients,
    shift,
)


def test_message_is_copied_when_posted():
    def run(rank):
        x = torch.full((1, 2), float(rank.rank()))
        pending = gather(x, rank)
        x.fill_(9.0)
        return pending.wait().tolist()

    assert VirtualGroup(2).run(run) == [[[0, 0, 1, 1]]] * 2


def test_failure_stops_all_ranks_and_is_raised():
    stopped = []

    def run(rank):
        if rank.rank() == 2:
            raise KeyError("broken")
        try:
            return gather(torch.ones(1, 2), rank).wait()
        except VirtualGroupAborted:
            stopped.append(rank.rank())
            raise

    group = VirtualGroup(4)
    with pytest.raises(KeyError, match="broken"):
        group.run(run)
    assert sorted(stopped) == [0, 1, 3]
    # The group can be used again.
    assert group.run(lambda rank: rank.rank()) == [0, 1, 2, 3]


def test_failure_in_backward_stops_all_ranks():
    def run(rank):
        x = torch.ones(1, 2, requires_grad=True)
        out = gather(x, rank).wait()
        if rank.rank() == 1:
            raise KeyError("broken")
        out.sum().backward()

    with pytest.raises(KeyError, match="broken"):
        VirtualGroup(3).run(run)


def test_unreceived_message_is_an_error():
    def run(rank):
        if rank.rank() == 0:
            shift(torch.ones(1, 2), [(0, 1, 0, 1)], rank).wait()

    with pytest.raises(RuntimeError, match="1 messages were never received: rank 0 to 1"):
        VirtualGroup(2).run(run)


def test_unexpected_shape_is_an_error():
    def run(rank):
        return gather(torch.ones(1, 2 + rank.rank()), rank).wait()

    with pytest.raises(RuntimeError, match="expected"):
        VirtualGroup(2).run(run)


def test_threads_inherit_the_grad_mode():
    group = VirtualGroup(2)
    assert group.run(lambda rank: torch.is_grad_enabled()) == [True, True]
    with torch.no_grad():
        assert group.run(lambda rank: torch.is_grad_enabled()) == [False, False]


def test_ranks_work_in_threads_started_by_hand():
    group, results = VirtualGroup(3), {}
    assert len(group) == 3 and group[1].rank() == 1 and group[1].size() == 3

    def main(r):
        results[r] = gather(torch.full((1, 1), float(r)), group[r]).wait().tolist()

    threads = [threading.Thread(target=main, args=(r,)) for r in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(3), [[0, 1, 2]])


def test_64_ranks_exchange_blocks_and_gradients():
    def run(rank):
        x = torch.full((1, 2), float(rank.rank()), dtype=torch.float64, requires_grad=True)
        total = sum(block.sum() for _, block in ring(x, rank))
        (total + gather(x, rank).wait().sum()).backward()
        lap = ring_with_gradients(x, rank)
        for visit in lap:
            visit.add_gradient(visit.block)
        return total.item(), x.grad.tolist(), lap.result().tolist()

    for r, (total, grad, result) in enumerate(VirtualGroup(64).run(run)):
        assert total == 64 * 63
        assert grad == [[128.0, 128.0]]
        assert result == [[64.0 * r, 64.0 * r]]


def test_empty_group_is_refused():
    with pytest.raises(ValueError, match="0 ranks"):
        VirtualGroup(0)

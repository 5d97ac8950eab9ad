"""LCDIST_DEBUG=1: ranks that disagree are named, on all ranks; ranks that agree notice nothing."""

import os

import pytest
import torch
import torch.distributed as dist

from lcdist.exchange import Group, VirtualGroup, gather, group_rank, ring, shift, swap
from tests.distributed import run_ranks
from tests.exchange.cases import contents, mirrored, products


def _shape(group: Group) -> None:
    gather(torch.ones(1, 4 + 2 * (group_rank(group) == 1)), group).wait()


def _dtype(group: Group) -> None:
    gather(torch.ones(1, 4, dtype=(torch.float32, torch.float64)[group_rank(group) == 1]), group)


def _verb(group: Group) -> None:
    x = torch.ones(4, 4)
    (swap(x, 0, 1, group) if group_rank(group) == 1 else gather(x, group)).wait()


def _one_more(group: Group) -> None:
    x = torch.ones(1, 4)
    if group_rank(group) == 1:
        gather(x, group, dim=0)
    for _ in ring(x, group):
        pass


def _plan(group: Group) -> None:
    shift(torch.ones(1, 4), [(0, 1, 0, 1 + (group_rank(group) == 1))], group).wait()


def _left_the_lap(group: Group) -> None:
    x = torch.ones(1, 4)
    for i, _ in enumerate(ring(x, group)):
        if i == 1 and group_rank(group) == 1:
            break
    gather(x, group).wait()


FAULTS = {
    "shape": (_shape, "gather forward, [1x6] torch.float32"),
    "dtype": (_dtype, "gather forward, [1x4] torch.float64"),
    "verb": (_verb, "swap forward, [-1x-1] torch.float32, sizes [4, 4, 4, 4] [1, 1, 1, 1]"),
    "one more": (_one_more, "gather forward, [1x4] torch.float32"),
    "plan": (_plan, "shift forward, [1x-1] torch.float32, plan "),
    "left the lap": (_left_the_lap, "exchange 2, gather forward"),
}


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("LCDIST_DEBUG", "1")


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rank_that_differs_is_named(fault, debug):
    run, words = FAULTS[fault]
    with pytest.raises(RuntimeError, match="disagree about the next exchange") as caught:
        VirtualGroup(4).run(run)
    text = str(caught.value)
    assert "\n  rank 1: " in text and words in text.splitlines()[1]
    assert "\n  ranks [0, 2, 3]: " in text


def test_agreeing_ranks_notice_nothing(debug):
    group = VirtualGroup(3)
    assert group.run(contents) == [[]] * 3
    assert mirrored(group.run(products)) == []


def _world(rank: int, n: int) -> list[str]:
    os.environ["LCDIST_DEBUG"] = "1"
    group = dist.group.WORLD
    x = torch.ones(1, 4, requires_grad=True)
    (gather(x, group).wait().sum() + sum(block.sum() for _, block in ring(x, group))).backward()
    assert x.grad is not None and x.grad.tolist() == [[2.0 * n] * 4]
    told = []
    for run in (_shape, _dtype):
        with pytest.raises(RuntimeError) as caught:
            run(group)
        told.append(str(caught.value))
    return told


def test_on_gloo_every_rank_is_told():
    for told in run_ranks(_world, 3):
        assert all("\n  rank 1: exchange " in text for text in told)
        assert all("\n  ranks [0, 2]: exchange " in text for text in told)

"""LCDIST_DEBUG=1: the error on every rank names the ranks that disagree."""

import pytest
import torch

from lcdist.exchange import Group, VirtualGroup, gather, group_rank, ring, shift, swap
from tests.exchange.cases import adjoint_products, wrong_adjoints, wrong_results


def different_shape(group: Group) -> None:
    gather(torch.ones(1, 4 + 2 * (group_rank(group) == 1)), group).wait()


def different_dtype(group: Group) -> None:
    gather(torch.ones(1, 4, dtype=(torch.float32, torch.float64)[group_rank(group) == 1]), group)


def _verb(group: Group) -> None:
    x = torch.ones(4, 4)
    (swap(x, 0, 1, group) if group_rank(group) == 1 else gather(x, group)).wait()


def _extra_exchange(group: Group) -> None:
    x = torch.ones(1, 4)
    if group_rank(group) == 1:
        gather(x, group, dim=0)
    for _ in ring(x, group):
        pass


def _plan(group: Group) -> None:
    shift(torch.ones(1, 4), [(0, 1, 0, 1 + (group_rank(group) == 1))], group).wait()


def _unfinished_lap(group: Group) -> None:
    x = torch.ones(1, 4)
    for i, _ in enumerate(ring(x, group)):
        if i == 1 and group_rank(group) == 1:
            break
    gather(x, group).wait()


FAULTS = {
    "shape": (different_shape, "gather forward, [1x6] torch.float32"),
    "dtype": (different_dtype, "gather forward, [1x4] torch.float64"),
    "verb": (_verb, "swap forward, [-1x-1] torch.float32, sizes [4, 4, 4, 4] [1, 1, 1, 1]"),
    "extra exchange": (_extra_exchange, "gather forward, [1x4] torch.float32"),
    "plan": (_plan, "shift forward, [1x-1] torch.float32, plan "),
    "unfinished lap": (_unfinished_lap, "exchange 2, gather forward"),
}


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("LCDIST_DEBUG", "1")


@pytest.mark.parametrize("fault", FAULTS)
def test_error_names_the_rank_that_differs(fault, debug):
    run, label = FAULTS[fault]
    with pytest.raises(RuntimeError, match="disagree about the next exchange") as error:
        VirtualGroup(4).run(run)
    text = str(error.value)
    assert "\n  rank 1: " in text and label in text.splitlines()[1]
    assert "\n  ranks [0, 2, 3]: " in text


def test_debug_mode_accepts_ranks_that_agree(debug):
    group = VirtualGroup(3)
    assert group.run(wrong_results) == [[]] * 3
    assert wrong_adjoints(group.run(adjoint_products)) == []

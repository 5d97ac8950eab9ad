"""Every verb, on gloo and on virtual ranks: what arrives, and <E x, y> = <x, E' y> in float64."""

import pytest
import torch
import torch.distributed as dist

from lcdist.exchange import VirtualGroup
from tests.distributed import run_ranks
from tests.exchange.cases import contents, mirrored, products

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


def _world(rank: int, n: int) -> tuple[list[str], dict[str, tuple[float, float]]]:
    group = dist.group.WORLD
    wrong = [f"{name}, {dtype}" for dtype in DTYPES for name in contents(group, dtype)]
    return wrong, products(group)


@pytest.mark.parametrize("n", range(1, 7))
def test_on_gloo(n):
    results = run_ranks(_world, n)
    assert [wrong for wrong, _ in results] == [[]] * n
    assert mirrored([parts for _, parts in results]) == []


@pytest.mark.parametrize("n", range(1, 9))
def test_on_virtual_ranks(n):
    group = VirtualGroup(n)
    for dtype in DTYPES:
        assert group.run(lambda rank, dtype=dtype: contents(rank, dtype)) == [[]] * n
    assert mirrored(group.run(products)) == []


def test_on_one_process_without_a_group():
    assert contents(None) == []
    assert mirrored([products(None)]) == []


def _subgroups(rank: int, n: int) -> tuple[list[str], dict[str, tuple[float, float]]]:
    groups = [dist.new_group([1, 3, 4]), dist.new_group([0, 2])]
    group = groups[0] if rank in (1, 3, 4) else groups[1]
    return contents(group), products(group)


def test_on_groups_that_are_not_the_world():
    results = run_ranks(_subgroups, 5)
    assert [wrong for wrong, _ in results] == [[]] * 5
    for members in ([1, 3, 4], [0, 2]):
        assert mirrored([results[rank][1] for rank in members]) == []

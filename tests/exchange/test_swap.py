"""swap: its inverse, and sizes that do not fit."""

import pytest
import torch

from lcdist.exchange import VirtualGroup, swap


def test_swap_and_its_inverse_are_the_identity():
    sizes = {"shard_sizes": [2, 0, 3], "full_sizes": [1, 4, 0]}
    inverse_sizes = {"shard_sizes": sizes["full_sizes"], "full_sizes": sizes["shard_sizes"]}

    def run(rank):
        x = torch.randn(2, sizes["shard_sizes"][rank.rank()], 5)
        swapped = swap(x, 1, 2, rank, **sizes).wait()
        assert swapped.shape == (2, 5, sizes["full_sizes"][rank.rank()])
        return torch.equal(swap(swapped, 2, 1, rank, **inverse_sizes).wait(), x)

    assert VirtualGroup(3).run(run) == [True] * 3


def test_swap_errors_name_the_sizes():
    rank, x = VirtualGroup(2)[0], torch.ones(4, 3)
    with pytest.raises(ValueError, match="dim 1 has 3 entries, not a multiple of 2"):
        swap(x, 0, 1, rank)
    with pytest.raises(ValueError, match=r"full_sizes \[1, 1\] for 2 ranks and 3 entries"):
        swap(x, 0, 1, rank, full_sizes=[1, 1])
    with pytest.raises(ValueError, match=r"shard_sizes \[3, 4\] on rank 0 of 2, which holds 4"):
        swap(x, 0, 1, rank, shard_sizes=[3, 4], full_sizes=[1, 2])
    with pytest.raises(AssertionError, match="two dims"):
        swap(x, 1, -1, rank)

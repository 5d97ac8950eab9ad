"""Assign the samples of a step to data-parallel ranks so that every rank has similar work.

The cost of attention over packed documents is proportional to the sum of their squared lengths.
Ranks synchronize once per step, when gradients are summed, so the total work of a rank's samples
should be even. Samples are assigned in order of decreasing work to the rank with the least work so
far (Graham's rule, SIAM J. Appl. Math. 17, 1969). Every rank gets the same number of samples,
because the shape of a step is the same on every rank. The set of samples of a step does not change,
so the loss and the position for resuming do not change either.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist.data.datasets.sample import Dataset, HasCuSeqlens


def attention_work(cu_seqlens: Tensor) -> int:
    """Return the sum of the squared document lengths of a row, padding included."""
    return int(cu_seqlens.to(torch.int64).diff().square().sum())


def sample_cu_seqlens(dataset: Dataset, index: int) -> Tensor:
    """Return `cu_seqlens` of a sample, without reading its tokens if the dataset supports that."""
    if isinstance(dataset, HasCuSeqlens):
        return dataset.cu_seqlens(index)
    return dataset.sample(index).cu_seqlens


def assign_by_work(works: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Assign the items of `works` to ranks, equally many to each.

    The result is the same on every rank: ties go to the lower item number and the lower rank.

    Args:
        works: work of each item; their number is a multiple of `num_ranks`.
        num_ranks: number of data-parallel ranks.

    Returns:
        For each rank, the indices into `works` in ascending order.
    """
    per_rank = len(works) // num_ranks
    assert per_rank * num_ranks == len(works)
    assigned: list[list[int]] = [[] for _ in range(num_ranks)]
    totals = [0] * num_ranks
    for item in sorted(range(len(works)), key=lambda i: (-works[i], i)):
        open_ranks = (rank for rank in range(num_ranks) if len(assigned[rank]) < per_rank)
        rank = min(open_ranks, key=lambda r: (totals[r], r))
        assigned[rank].append(item)
        totals[rank] += works[item]
    return [sorted(items) for items in assigned]

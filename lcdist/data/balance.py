"""Which data-parallel rank gets which samples of a step, so that none waits long for another.

Attention over packed documents costs the sum of their squared lengths, and ranks meet once a step,
when gradients are summed: so it is the work of a rank's samples together that has to be even. They
are dealt longest first to the rank with the least work so far (Graham's rule, SIAM J. Appl. Math.
17, 1969), each rank getting equally many, since the shape of a step is the same on every rank.
Which samples a step has does not change, so neither does its loss, nor where a run resumes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist.data.datasets.sample import Dataset, HasTable


def attention_work(cu_seqlens: Tensor) -> int:
    """The sum of the squared lengths of a row's documents, padding included."""
    return int(cu_seqlens.to(torch.int64).diff().square().sum())


def table_of(dataset: Dataset, index: int) -> Tensor:
    """Where the documents of a sample begin and end, without reading tokens where that can be."""
    if isinstance(dataset, HasTable):
        return dataset.table(index)
    return dataset.sample(index).cu_seqlens


def deal(works: Sequence[int], ranks: int) -> list[list[int]]:
    """The places in `works` that each rank gets, ascending; equally many each.

    `ranks` divides their number. The same on every rank: ties go to what has the lower number.
    """
    each = len(works) // ranks
    assert each * ranks == len(works)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for place in sorted(range(len(works)), key=lambda i: (-works[i], i)):
        rank = min((r for r in range(ranks) if len(hands[r]) < each), key=lambda r: (sums[r], r))
        hands[rank].append(place)
        sums[rank] += works[place]
    return [sorted(hand) for hand in hands]

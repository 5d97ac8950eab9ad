"""Every exchange on virtual ranks: its result, and <E x, y> = <x, E' y> in float64."""

import pytest
import torch

from lcdist.exchange import VirtualGroup
from tests.exchange.cases import adjoint_products, wrong_adjoints, wrong_results

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_exchanges_on_virtual_ranks_equal_one_process(n):
    group = VirtualGroup(n)
    for dtype in DTYPES:
        assert group.run(lambda rank, dtype=dtype: wrong_results(rank, dtype)) == [[]] * n
    assert wrong_adjoints(group.run(adjoint_products)) == []


def test_exchanges_without_a_group_run_in_one_process():
    assert wrong_results(None) == []
    assert wrong_adjoints([adjoint_products(None)]) == []

"""Exchanges between processes on gloo; one launch of 2 and one of 4 ranks run all cases."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lcdist.exchange import gather, ring, ring_with_gradients
from tests.distributed import run_ranks
from tests.exchange.cases import adjoint_products, wrong_adjoints, wrong_results
from tests.exchange.test_debug import different_dtype, different_shape
from tests.exchange.test_ring import (
    block_of,
    dense_gradients,
    gradient_by_autograd,
    gradient_by_hand,
)
from tests.exchange.test_traffic import check_bytes, count_bytes
from tests.exchange.test_verbs import DTYPES
from tests.tolerance import assert_matches

SUBGROUPS = ((1, 3, 2), (0,)), ((0, 2), (1, 3))


def two_laps_at_once(rank: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the results of two interleaved laps; their messages must not be confused."""
    first = ring_with_gradients(block_of(rank), group)
    second = ring_with_gradients(2 * block_of(rank), group)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(2 * one.block, two.block)
        one.add_gradient(one.block)
        two.add_gradient(two.block)
    return first.result(), second.result()


def debug_errors(n: int, group: ProcessGroup) -> list[str]:
    """Run an exchange that agrees and two that do not under LCDIST_DEBUG; return the errors."""
    os.environ["LCDIST_DEBUG"] = "1"
    x = torch.ones(1, 4, requires_grad=True)
    (gather(x, group).wait().sum() + sum(block.sum() for _, block in ring(x, group))).backward()
    assert x.grad is not None and x.grad.tolist() == [[2.0 * n] * 4]
    messages = []
    for run in (different_shape, different_dtype):
        with pytest.raises(RuntimeError) as error:
            run(group)
        messages.append(str(error.value))
    return messages


def all_cases(rank: int, n: int) -> dict:
    group = dist.group.WORLD
    assert group is not None
    results = {
        "wrong": [f"{name}, {dtype}" for dtype in DTYPES for name in wrong_results(group, dtype)],
        "products": adjoint_products(group),
        "bytes": count_bytes(group),
        "gradients": (gradient_by_hand(group), gradient_by_autograd(group)),
        "laps": two_laps_at_once(rank, group),
        "subgroups": [],
    }
    for members in SUBGROUPS if n == 4 else ():
        groups = [dist.new_group(list(ranks)) for ranks in members]
        own = next(g for g, ranks in zip(groups, members, strict=True) if rank in ranks)
        results["subgroups"].append((wrong_results(own), adjoint_products(own)))
    # Last, because it sets LCDIST_DEBUG.
    results["errors"] = debug_errors(n, group)
    return results


@pytest.mark.parametrize("n", [2, 4])
def test_exchanges_between_processes_equal_one_process(n):
    results = run_ranks(all_cases, n)
    assert [result["wrong"] for result in results] == [[]] * n
    assert wrong_adjoints([result["products"] for result in results]) == []
    for rank, result in enumerate(results):
        check_bytes(result["bytes"])
        for gradient in result["gradients"]:
            assert_matches(gradient, dense_gradients(n)[rank])
        first, second = result["laps"]
        assert_matches(first, n * block_of(rank))
        assert_matches(second, 2 * n * block_of(rank))
        others = [r for r in range(n) if r != 1]
        for message in result["errors"]:
            assert n == 2 or "\n  rank 1: exchange " in message
            assert n == 2 or f"\n  ranks {others}: exchange " in message
    for i, members in enumerate(SUBGROUPS if n == 4 else ()):
        for ranks in members:
            assert [results[rank]["subgroups"][i][0] for rank in ranks] == [[]] * len(ranks)
            assert wrong_adjoints([results[rank]["subgroups"][i][1] for rank in ranks]) == []

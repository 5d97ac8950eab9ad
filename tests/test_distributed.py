"""The multi-process harness: results in rank order, errors with their traceback, no hang."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks


def _total(rank: int, world_size: int, x: torch.Tensor) -> tuple[int, torch.Tensor, int, bool]:
    y = x + rank
    dist.all_reduce(y)
    assert dist.get_world_size() == world_size
    assert torch.empty(2).isnan().all()
    return rank, y, torch.get_num_threads(), "megatron.core" in sys.modules


def _one_fails(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("no good")
    dist.barrier()


def _one_dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def _one_sleeps(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)


def test_results_come_in_rank_order():
    x = torch.arange(3.0)
    for i, (rank, y, threads, _) in enumerate(run_ranks(_total, 3, x)):
        assert rank == i and threads == 1
        assert torch.equal(y, 3 * x + 3)


def test_a_failing_rank_ends_all_with_its_own_error_and_traceback():
    with pytest.raises(ValueError, match="no good") as caught:
        run_ranks(_one_fails, 3)
    assert "rank 1 of 3" in str(caught.value.__cause__)
    assert "_one_fails" in str(caught.value.__cause__)


def test_a_dead_rank_is_named():
    with pytest.raises(RuntimeError, match="rank 1 died without a word, exit code 7"):
        run_ranks(_one_dies, 2)


def test_time_up_names_who_was_not_done():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] not done after 2 s"):
        run_ranks(_one_sleeps, 2, timeout=2)

"""A run of 2,000 steps with saves holds memory, threads and open files at one level."""

import gc
from pathlib import Path
from typing import Any

import psutil
import pytest

from lcdist.commands.train import run
from lcdist.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.train.test_resume import config_in, launched

STEPS, EVERY = 2000, 100
TINY = (
    *("model.num_layers=1", "model.hidden_size=32", "model.ffn_hidden_size=32", "train.seqlen=16"),
    *("train.global_batch_size=1", "checkpoint.keep_last=1", "checkpoint.asynchronous=true"),
)
# Pages that the allocator keeps: a leak of one tensor of this model a step would be more than this.
SLACK = 4 * 2**20


def long_run(rank: int, world_size: int, folder: Path) -> list[tuple[int, int, int]]:
    """Return (resident bytes, threads, open files) halfway between saves."""
    launched(world_size)
    process, found = psutil.Process(), []
    real = Trainer._one_step

    def one_step(self: Trainer, *more: Any) -> Any:
        if self.step % EVERY == EVERY // 2:
            # A slow disk may still be writing.
            self.complete_save()
            gc.collect()
            found.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
        return real(self, *more)

    Trainer._one_step = one_step  # type: ignore[method-assign]
    try:
        words = (*TINY, f"train.steps={STEPS}", f"checkpoint.every={EVERY}")
        run(config_in(folder / "run", *words))
    finally:
        Trainer._one_step = real  # type: ignore[method-assign]
    return found


@pytest.mark.exhaustive
def test_memory_threads_and_open_files_stay_flat(tmp_path: Path) -> None:
    [found] = run_ranks(long_run, 1, tmp_path, timeout=300)
    assert len(found) == STEPS // EVERY
    # The first saves load what later ones use.
    memory, threads, files = zip(*found[4:], strict=True)
    assert len(set(threads)) == 1 and len(set(files)) == 1, found
    assert max(memory[-4:]) - min(memory[:4]) < SLACK, [each / 2**20 for each in memory]

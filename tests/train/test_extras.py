"""What attention learns beside its projections: loaded or left out by name, never decayed."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.checkpoint.read import open_checkpoint
from lcdist.checkpoint.save import Checkpointer
from lcdist.model.init import METHOD_PARAMS
from lcdist.rundir.paths import latest_in
from tests.distributed import run_ranks
from tests.engines.internals import ddp_wrappers_of, log_entry_of
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import gather_weights

TENSORIZED = ("attention.method=tensorized", "attention.modes=[4]", "train.seqlen=64")
FULL = ("train.seqlen=64",)


class Heard(logging.Handler):
    """The lines logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def save(rank: int, world_size: int, folder: Path, words: tuple[str, ...]) -> dict[str, Tensor]:
    trainer = Meshes().trainer(small(*words))
    take_steps(trainer, 2)
    trainer.checkpointer = Checkpointer(folder, keep_last=1)
    trainer.save()
    return gather_weights(trainer.engine)


def start(
    rank: int, world_size: int, folder: Path, words: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[str]]:
    heard = Heard()
    logging.getLogger("lcdist").addHandler(heard)
    trainer = Meshes().trainer(small(*words))
    latest = latest_in(folder)
    assert latest is not None
    trainer.start_from(open_checkpoint(latest))
    return gather_weights(trainer.engine), heard.lines


FOUR_RANKS = (4, ("parallel.tp_size=2", "parallel.pp_size=2"))
MESHES = [(1, ()), pytest.param(*FOUR_RANKS, marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize(("world_size", "mesh"), MESHES)
def test_a_full_model_starts_a_tensorized_one_and_back(
    tmp_path: Path, world_size: int, mesh: tuple[str, ...]
) -> None:
    [full] = run_ranks(save, 1, tmp_path / "full", FULL)
    found, said = run_ranks(start, world_size, tmp_path / "full", (*TENSORIZED, *mesh))[0]
    extras = {name for name in found if METHOD_PARAMS in name}
    assert len(extras) == 4 and found.keys() - extras == full.keys()
    assert all(torch.equal(found[name], full[name]) for name in full)
    for name in extras:
        assert torch.equal(found[name], torch.full((1, 4), math.log(4)))
        assert any(name in line and "keeps its initial value" in line for line in said)

    [tensorized] = run_ranks(save, 1, tmp_path / "tensorized", TENSORIZED)
    found, said = run_ranks(start, world_size, tmp_path / "tensorized", (*FULL, *mesh))[0]
    assert found.keys() == full.keys()
    assert all(torch.equal(found[name], tensorized[name]) for name in full)
    assert [METHOD_PARAMS in line and "is ignored" in line for line in said] == 4 * [True]


def idle_step(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights before and after a step without gradients: what weight decay alone does."""
    trainer = Meshes().trainer(small(*TENSORIZED, "optim.weight_decay=0.5"))
    before = {k: v.clone() for k, v in gather_weights(trainer.engine).items()}
    trainer.engine.forward_backward(trainer.loader.next_step())
    for chunk in ddp_wrappers_of(trainer):
        chunk.zero_grad_buffer()
    # A step without tokens would change nothing.
    log_entry_of(trainer)[1] = 1
    trainer.engine.step(1e-2)
    return before, gather_weights(trainer.engine)


def test_only_matrices_decay() -> None:
    [(before, after)] = run_ranks(idle_step, 1)
    for name, value in before.items():
        kept = torch.equal(after[name], value)
        assert kept == (value.ndim == 1 or METHOD_PARAMS in name), name

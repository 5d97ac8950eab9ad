"""A checkpoint of any engine, stage and mesh loads under any other: the same bits and steps."""

import signal
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from lcdist.checkpoint.read import open_checkpoint
from lcdist.checkpoint.save import Checkpointer
from lcdist.commands import train
from lcdist.rundir.paths import latest_in
from lcdist.train.trainer import Trainer
from tests.checkpoint.stored import assert_same_tensors
from tests.distributed import run_ranks
from tests.engines.internals import let_go
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import digest, gather_moments, gather_weights
from tests.train.test_resume import (
    config_in,
    killed_after,
    launched,
    signalled_at,
    unmeasured,
)

BEFORE, AFTER = 2, 2
SHAPE = ("model.num_layers=2", "train.global_batch_size=4")


class Run(NamedTuple):
    """A number of ranks and words of the configuration; stage None: the Megatron engine."""

    world_size: int
    stage: int | None
    words: tuple[str, ...] = ()

    @property
    def overrides(self) -> tuple[str, ...]:
        """All words, without the number of ranks."""
        if self.stage is None:
            return self.words
        return ("train.engine=deepspeed", f"deepspeed.stage={self.stage}", *self.words)

    def __str__(self) -> str:
        engine = "megatron" if self.stage is None else f"stage{self.stage}"
        words = [word.split(".")[-1] for word in self.words]
        return "-".join([f"{self.world_size}ranks", engine, *words])


BF16, LORA = "train.dtype=bf16", "lora.rank=4"
CPU = "deepspeed.offload_optimizer=cpu"
MEGATRON, ZERO3 = Run(2, None), Run(2, 3)
# Where a checkpoint was written, and where it is read.
DEFAULT = (
    (MEGATRON, ZERO3),
    (ZERO3, MEGATRON),
    (ZERO3, ZERO3),
    (Run(2, 1, (BF16,)), Run(2, None, (BF16,))),
    (Run(2, None, (BF16,)), Run(2, 2, (BF16, CPU))),
)
ONE = (Run(1, None), Run(1, 2), Run(1, 3))
TWO = (MEGATRON, Run(2, 0), Run(2, 1, (CPU,)), Run(2, 3, ("parallel.tp_size=2",)))
RUNS = (*ONE, *TWO)
ALL = [(run, run) for run in RUNS]
ALL += [(source, RUNS[(n + 2) % len(RUNS)]) for n, source in enumerate(RUNS)]
ALL += [(Run(2, a, (LORA,)), Run(2, b, (LORA,))) for a, b in ((None, 3), (3, None), (2, 3))]
TIERS = [
    *(pytest.param("default", *case, id=f"{case[0]}-to-{case[1]}") for case in DEFAULT),
    *(
        pytest.param("all", *case, id=f"{case[0]}-to-{case[1]}", marks=pytest.mark.exhaustive)
        for case in ALL
        if case not in DEFAULT
    ),
]


class Standing(NamedTuple):
    """Digests of whole tensors, the step, and the numbers of the steps to come; on rank 0."""

    weights: str
    moments: str
    step: int
    numbers: list[tuple[float, float]]


def standing(trainer: Trainer) -> Standing:
    """All ranks call it; takes AFTER more steps."""
    weights, moments = gather_weights(trainer.engine), gather_moments(trainer.engine)
    step = trainer.step
    return Standing(digest(weights), digest(moments), step, take_steps(trainer, AFTER))


def cases(tier: str) -> list[tuple[Run, Run]]:
    return list(DEFAULT) if tier == "default" else [case for case in ALL if case not in DEFAULT]


def save_all(rank: int, world_size: int, folder: Path, tier: str) -> dict[Run, Standing]:
    meshes, found = Meshes(), {}
    for run in dict.fromkeys(source for source, _ in cases(tier)):
        if run.world_size != world_size:
            continue
        trainer = meshes.trainer(small(*SHAPE, *run.overrides))
        take_steps(trainer, BEFORE)
        trainer.checkpointer = Checkpointer(folder / str(run), keep_last=1)
        trainer.save()
        found[run] = standing(trainer)
        let_go(trainer)
    return found


def load_all(
    rank: int, world_size: int, folder: Path, tier: str
) -> dict[tuple[Run, Run], Standing]:
    meshes, found = Meshes(), {}
    for source, run in cases(tier):
        if run.world_size != world_size:
            continue
        trainer = meshes.trainer(small(*SHAPE, *run.overrides, "train.seed=3"))
        take_steps(trainer, 1)
        trainer.resume(open_checkpoint(folder / str(source)))
        found[source, run] = standing(trainer)
        let_go(trainer)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def results(folder: Path, tier: str) -> tuple[dict, dict]:
    """Return where each run stood when it was saved, and where each that loaded it stands."""
    saved: dict = {}
    loaded: dict = {}
    sizes = {run.world_size for case in cases(tier) for run in case}
    for size in sizes:
        saved |= run_ranks(save_all, size, folder / tier, tier, timeout=300)[0]
    for size in sizes:
        loaded |= run_ranks(load_all, size, folder / tier, tier, timeout=300)[0]
    return saved, loaded


@pytest.mark.parametrize(("tier", "source", "target"), TIERS)
def test_goes_on_where_it_was(folder: Path, tier: str, source: Run, target: Run) -> None:
    saved, loaded = results(folder, tier)
    before, after = saved[source], loaded[source, target]
    assert (after.weights, after.moments, after.step) == before[:3]
    if source == target:
        assert after.numbers == before.numbers
    else:
        tolerance = 1e-3 if BF16 in source.words else 1e-5
        for mine, other in zip(before.numbers, after.numbers, strict=True):
            assert other == pytest.approx(mine, rel=tolerance)


ENGINE = ("train.engine=deepspeed", "deepspeed.stage=3", "train.recompute=full")


def stop_and_go(rank: int, world_size: int, folder: Path) -> None:
    """Run to the end: at once, after a kill before a save, and after a signal between two."""
    launched(world_size)
    train.run(config_in(folder / "whole", *ENGINE))
    killed_after(config_in(folder / "killed", *ENGINE), 4, saved=False)
    train.run(config_in(folder / "killed", *ENGINE))
    signalled_at(config_in(folder / "term", *ENGINE), 3, signal.SIGTERM, 0)
    train.run(config_in(folder / "term", *ENGINE))


@pytest.mark.exhaustive
def test_a_killed_run_ends_as_if_never_stopped(tmp_path: Path) -> None:
    run_ranks(stop_and_go, 2, tmp_path, timeout=300)
    whole = latest_in(tmp_path / "whole" / "checkpoints")
    assert whole is not None
    for name in ("killed", "term"):
        found = latest_in(tmp_path / name / "checkpoints")
        assert found is not None and found.name == whole.name
        assert_same_tensors(found, whole)
        assert unmeasured(tmp_path / name) == unmeasured(tmp_path / "whole")

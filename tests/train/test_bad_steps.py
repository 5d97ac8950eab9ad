"""Steps and states that are not finite are skipped or end the run, and never reach a checkpoint."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lcdist.commands.train import run
from lcdist.config.schema import Config
from lcdist.engines.optimizer import ShardedAdamW
from lcdist.evaluate import loaded_model
from lcdist.plan import make_plan
from lcdist.rundir.records import read_records
from lcdist.rundir.status import read_status
from lcdist.train.bad_steps import finite_by_ends, finite_by_norm
from lcdist.train.trainer import Trainer
from tests.checkpoint.stored import assert_same_tensors
from tests.distributed import run_ranks
from tests.model.small import small
from tests.train.test_resume import (
    STEPS,
    before_step,
    config_in,
    killed_after,
    launched,
    unmeasured,
)

NORM = "decoder.final_layernorm.weight"


@contextmanager
def bad_steps(*steps: int) -> Iterator[None]:
    """Within, a gradient of these steps is not finite, as summed over ranks."""
    real = ShardedAdamW.step

    def step(self: ShardedAdamW, lr: float, log_entry: torch.Tensor) -> torch.Tensor:
        # A skipped step is not counted by the optimizer, so the schedule tells the step.
        if _step_of(self) in steps:
            dict(self.parameters)[NORM].main_grad.fill_(float("nan"))  # type: ignore[attr-defined]
        return real(self, lr, log_entry)

    taken: dict[int, int] = {}
    real_one = Trainer._one_step

    def one_step(self: Trainer, *more: Any) -> Any:
        taken[id(self.engine.optimizer)] = self.step + 1  # type: ignore[attr-defined]
        return real_one(self, *more)

    def _step_of(optimizer: ShardedAdamW) -> int:
        return taken[id(optimizer)]

    ShardedAdamW.step, Trainer._one_step = step, one_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        ShardedAdamW.step, Trainer._one_step = real, real_one  # type: ignore[method-assign]


@contextmanager
def diverged_after(step: int) -> Iterator[None]:
    """Within, a master is infinite after `step`, though its gradients were finite."""
    real = Trainer._one_step

    def one_step(self: Trainer, *more: Any) -> Any:
        answer = real(self, *more)
        if self.step == step and torch.distributed.get_rank() == 0:
            optimizer: ShardedAdamW = self.engine.optimizer  # type: ignore[attr-defined]
            optimizer.second[0].view(-1)[0] = float("inf")
        return answer

    Trainer._one_step = one_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._one_step = real  # type: ignore[method-assign]


def refused(config: Config) -> str:
    with pytest.raises((FloatingPointError, FileNotFoundError)) as caught:
        run(config)
    return str(caught.value)


def bad_runs(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Run into bad steps in several ways; return what each run said."""
    launched(world_size)
    said: dict[str, Any] = {}
    skips = ("train.on_bad_step=skip", "train.bad_step_limit=2", "checkpoint.keep_last=9")
    with bad_steps(2, 3):
        run(config_in(folder / "skips", *skips))
        killed_after(config_in(folder / "resumes", *skips), 4, saved=True)
        run(config_in(folder / "resumes", *skips))
    with bad_steps(2, 3, 5):
        said["limit"] = refused(config_in(folder / "limit", *skips))
    one = ("checkpoint.every=1", "checkpoint.keep_last=1")
    with bad_steps(4):
        said["stop"] = refused(config_in(folder / "stops", *one))
        said["again"] = refused(config_in(folder / "stops", *one))
    said["before"] = sorted(p.name for p in (folder / "stops" / "checkpoints").iterdir())
    torch.distributed.barrier()
    back = (*one, "checkpoint.resume_from=2")
    with bad_steps(5):
        said["back"] = refused(config_in(folder / "stops", *back))
    run(config_in(folder / "stops", *back))
    with diverged_after(4):
        said["diverged"] = refused(config_in(folder / "diverges"))
    with before_step(3, 0, partial(shutil.rmtree, folder / "gone")):
        said["gone"] = refused(config_in(folder / "gone"))
    return said


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bad")
    first, other = run_ranks(bad_runs, 2, folder)
    assert first == other, "all ranks say the same"
    return folder, first


def test_skipped_steps_are_recorded_and_resume_bit_exact(bad: Any) -> None:
    folder, _ = bad
    records = read_records(folder / "skips" / "metrics.jsonl")
    assert [record.skipped for record in records] == [False, True, True, False, False, False]
    assert [record.samples for record in records] == [4 * step for step in range(1, STEPS + 1)]
    assert unmeasured(folder / "resumes") == unmeasured(folder / "skips")
    ends = [folder / name / "checkpoints" / "step_00000006" for name in ("skips", "resumes")]
    assert_same_tensors(*ends)
    assert [json.loads((end / "lcdist.json").read_text())["skipped_steps"] for end in ends] == [
        2,
        2,
    ]


def test_a_skipped_step_changes_no_weight(bad: Any) -> None:
    folder = bad[0] / "limit" / "checkpoints"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    # Steps 2 and 3 were skipped: what step 2 saved is what step 1 had made.
    assert names == ["step_00000002", "step_00000004"]


def test_the_report_names_step_samples_rank_parameter_and_checkpoint(bad: Any) -> None:
    folder, said = bad
    for part in (
        "step 4 (samples 12 to 15): gradient norm is nan",
        f"parameters with non-finite gradients: {NORM}",
        "on ranks 0, 1;",
        "The run goes on from step 3, or with checkpoint.resume_from=2 from step 2",
        "train.on_bad_step=skip",
    ):
        assert part in said["stop"], said["stop"]
    assert said["again"] == said["stop"]
    assert "step 5 (samples 16 to 19)" in said["limit"]
    assert "2 steps were skipped before, as many as train.bad_step_limit allows" in said["limit"]
    for name in ("stops", "limit", "diverges"):
        assert read_status(folder / name) is not None
    status = read_status(folder / "limit")
    assert status is not None and status["status"] == "failed"
    assert status["reason"] == said["limit"]


def test_the_last_checkpoint_that_a_finite_step_followed_stays(bad: Any) -> None:
    """Step 3 may have written weights that only then fail; keep_last = 1 keeps step 2 as well."""
    folder, said = bad
    assert said["before"] == ["latest", "step_00000002", "step_00000003"]
    names = sorted(path.name for path in (folder / "stops" / "checkpoints").iterdir())
    assert names == ["latest", "left_step_00000003", "step_00000005", "step_00000006"]


def test_a_run_goes_back_once(bad: Any) -> None:
    folder, said = bad
    # The second start with the same setting went on from step 4, which the first had saved.
    assert "The run goes on from step 4" in said["back"]
    starts = json.loads((folder / "stops" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 3, 2, 4]


def test_a_state_that_is_not_finite_is_never_saved(bad: Any) -> None:
    folder, said = bad
    assert said["diverged"].startswith("after step 4 these are not finite: optimizer.")
    assert "Nothing is saved. The run goes on from step 2" in said["diverged"]
    names = sorted(path.name for path in (folder / "diverges" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002"]
    status = read_status(folder / "diverges")
    assert status is not None and status["reason"] == said["diverged"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("finite", [finite_by_ends, finite_by_norm])
def test_every_value_that_is_not_finite_is_found(finite: Any, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    whole = [torch.full((33,), -largest, dtype=dtype), torch.tensor(largest, dtype=dtype)]
    whole.append(torch.arange(70, dtype=dtype).view(7, 10).T)
    whole[0][5] = largest
    assert finite(whole) == [True] * 3 and finite([]) == []
    for place in (0, 31, 32):
        for bad in (torch.nan, torch.inf, -torch.inf):
            broken = whole[0].clone()
            broken[place] = bad
            assert finite([whole[1], broken, whole[2]]) == [True, False, True]


def test_a_run_whose_folder_is_removed_ends(bad: Any) -> None:
    folder, said = bad
    assert said["gone"].endswith("was removed while the run trained: it ends after step 3, and "
                                 "nothing is saved")  # fmt: skip
    assert not (folder / "gone").exists()


def test_deepspeed_does_not_skip() -> None:
    words = ("train.engine=deepspeed", "train.on_bad_step=skip")
    with pytest.raises(ValueError, match="no step can be skipped under DeepSpeed"):
        make_plan(small(*words), 1)


def evaluate_while_pruned(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    launched(world_size)
    config = config_in(folder / "run", "checkpoint.keep_last=9")
    run(config)
    points = folder / "run" / "checkpoints"
    real, (old, new) = loaded_model.verify_checkpoint, (points / "step_00000004", points / "latest")
    if rank == 0:
        new.write_text(old.name)
    torch.distributed.barrier()

    def verify(*words: Any) -> None:
        if rank == 0 and old.exists():
            shutil.rmtree(old)
            new.write_text("step_00000006")
        torch.distributed.barrier()
        real(*words)

    loaded_model.verify_checkpoint = verify
    try:
        loaded = loaded_model.load_model(folder / "run", [], [])
    finally:
        loaded_model.verify_checkpoint = real
    return {"path": loaded.checkpoint.path.name}


def test_evaluation_takes_the_newest_again_when_its_checkpoint_is_pruned(tmp_path: Path) -> None:
    assert run_ranks(evaluate_while_pruned, 2, tmp_path) == [{"path": "step_00000006"}] * 2

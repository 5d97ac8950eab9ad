"""A checkpoint is whole or not there: a save killed at any stage leaves the one before it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lcdist.checkpoint import manifest
from lcdist.checkpoint import save as room
from lcdist.checkpoint.read import open_checkpoint
from lcdist.checkpoint.save import Checkpointer
from lcdist.rundir.paths import latest_in
from tests.checkpoint.stored import assert_same_tensors
from tests.distributed import run_ranks
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import digest, gather_weights


class Killed(BaseException):
    """The process ends here; nothing in a save may tidy up after it."""


def dies_in(name: str, condition: Callable[..., bool], torn: bool = False) -> Any:
    """Return a stage in which the first call of the function `name` that meets `condition` kills.

    torn: `write_file` has written half of its temporary file.
    """

    @contextmanager
    def stage() -> Iterator[None]:
        owners = {"rename": Path, "replace": Path, "rmtree": room.shutil, "write_file": manifest}
        owner = owners[name]
        real = getattr(owner, name)

        def fake(*args: Any) -> Any:
            if not condition(*args):
                return real(*args)
            if torn:
                path, text = args
                path.with_name(f".{path.name}.part").write_text(text[: len(text) // 2])
            raise Killed

        setattr(owner, name, fake)
        try:
            yield
        finally:
            setattr(owner, name, real)

    return stage


@contextmanager
def dies_writing(share: float) -> Iterator[None]:
    """Stage: Megatron has written this share of every file, and not all files."""
    real = room.start_save

    def fake(state: dict[str, Any], folder: Path) -> None:
        if share:
            request = real(state, folder)
            _, buckets, results = request.async_fn_args
            room.write_buckets(buckets, results, {})
            for finalize in request.finalize_fns:
                finalize()
            for number, file in enumerate(sorted(folder.iterdir())):
                os.truncate(file, int(file.stat().st_size * share))
                if number % 2:
                    file.unlink()
        raise Killed

    room.start_save = fake
    try:
        yield
    finally:
        room.start_save = real


STAGES: dict[str, tuple[Any, int]] = {
    "empty folder": (lambda: dies_writing(0.0), 2),
    "tensors half written": (lambda: dies_writing(0.5), 2),
    "no manifest": (dies_in("write_file", lambda file, text: file.name == manifest.MANIFEST), 2),
    "half a manifest": (
        dies_in("write_file", lambda file, text: file.name == manifest.MANIFEST, torn=True),
        2,
    ),
    "not renamed": (dies_in("rename", lambda old, new: new.name == "step_00000003"), 2),
    "no pointer": (dies_in("write_file", lambda file, text: "latest" in file.name), 2),
    "half a pointer": (
        dies_in("write_file", lambda file, text: "latest" in file.name, torn=True),
        2,
    ),
    "old pointer": (dies_in("replace", lambda old, new: new.name == "latest"), 2),
    "not pruned": (dies_in("rename", lambda old, new: old.name == "step_00000001"), 3),
    "not swept": (dies_in("rmtree", lambda path: "old-step_00000001" in path.name), 3),
}


def kill_at_every_stage(rank: int, world_size: int, folder: Path) -> dict[str, list[Any]]:
    """By stage: step that loads after the kill, whether its weights are right, what a new save
    leaves in the folder."""
    meshes, found = Meshes(), {}
    config = small("model.num_layers=1")
    for name, (stage, _) in STAGES.items():
        trainer = meshes.trainer(config)
        trainer.checkpointer = Checkpointer(folder / name, keep_last=2)
        bits = {}
        for _ in range(3):
            take_steps(trainer, 1)
            bits[trainer.step] = digest(gather_weights(trainer.engine))
            if trainer.step < 3:
                trainer.save()
        with stage(), pytest.raises(Killed):
            trainer.save()
        again = meshes.trainer(config)
        again.checkpointer = Checkpointer(folder / name, keep_last=2)
        again.resume(open_checkpoint(folder / name))
        step = again.step
        right = digest(gather_weights(again.engine)) == bits[step]
        take_steps(again, 3 - step)
        again.save()
        right &= digest(gather_weights(again.engine)) == bits[3]
        left = sorted(path.name for path in (folder / name).iterdir())
        found[name] = [step, right, left, latest_in(folder / name)]
    return found


@pytest.fixture(scope="module")
def after_kills(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Any]]]:
    folder = tmp_path_factory.mktemp("kills")
    return folder, run_ranks(kill_at_every_stage, 1, folder, timeout=120)[0]


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_saving(after_kills: Any, stage: str) -> None:
    folder, found = after_kills
    step, right, left, latest = found[stage]
    assert step == STAGES[stage][1]
    assert right, "resumed, the run takes the same steps"
    assert left == ["latest", "step_00000002", "step_00000003"], "nothing half is left"
    assert latest == folder / stage / "step_00000003"
    assert_same_tensors(latest, folder / "empty folder" / "step_00000003")

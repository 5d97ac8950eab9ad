"""A run that stops and goes on ends as one that never stopped; a folder belongs to one run."""

import contextlib
import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lcdist.commands.train import run
from lcdist.config import ConfigError
from lcdist.config.schema import Config
from lcdist.distributed.rank_zero import enter_on_rank_zero
from lcdist.rundir.lock import lock_run_folder
from lcdist.rundir.paths import latest_in
from lcdist.rundir.records import StepRecord, read_records
from lcdist.rundir.run_config import check_same_run, write_config
from lcdist.rundir.status import read_status, write_status
from lcdist.train.trainer import Trainer
from tests.checkpoint.stored import assert_same_tensors
from tests.distributed import run_ranks
from tests.model.small import small

STEPS = 6
# What differs between two runs of the same steps: all that a clock or a scale of memory says.
MEASURED = {"time", "wall", "tokens_per_second", "mfu_full", "mfu_causal", "memory_bytes", "ranks"}


class Killed(BaseException):
    """The process ends here."""


def config_in(folder: Path, *overrides: str) -> Config:
    words = [f"log.folder={folder}", f"train.steps={STEPS}", "checkpoint.every=2"]
    return small("model.num_layers=2", "parallel.timeout=50", *words, *overrides)


def launched(world_size: int) -> None:
    """Set the launcher's environment variables."""
    os.environ["WORLD_SIZE"] = str(world_size)


def killed_after(config: Config, step: int, saved: bool) -> None:
    """Run to the end of `step`, with or without the checkpoint that is due there."""
    real = Trainer.save

    def save(self: Trainer, wait: bool = True) -> None:
        if self.step == step:
            if saved:
                real(self)
            raise Killed
        real(self)

    Trainer.save = save  # type: ignore[method-assign]
    try:
        with contextlib.suppress(Killed):
            run(config)
    finally:
        Trainer.save = real  # type: ignore[method-assign]


@contextlib.contextmanager
def before_step(step: int, rank: int, act: Callable[[], Any]) -> Iterator[None]:
    """Within, call `act` on one rank when it begins to take `step`."""
    real = Trainer._one_step

    def one_step(self: Trainer, *more: Any) -> Any:
        if self.step == step - 1 and self.mesh.rank == rank:
            act()
        return real(self, *more)

    Trainer._one_step = one_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer._one_step = real  # type: ignore[method-assign]


def signalled_at(config: Config, step: int, number: int, rank: int) -> Any:
    """Run, and signal one rank to stop while it takes `step`."""
    with before_step(step, rank, lambda: os.kill(os.getpid(), number)):
        return run(config)


def stop_and_go(rank: int, world_size: int, folder: Path) -> list[Any]:
    """Outcomes of: a run that never stops, three that do, and the starts that end them."""
    launched(world_size)
    found: list[Any] = [run(config_in(folder / "whole"))]
    killed_after(config_in(folder / "killed"), 4, saved=False)
    found.append(run(config_in(folder / "killed")))
    for name, number, of_rank in (("term", signal.SIGTERM, 0), ("usr1", signal.SIGUSR1, 1)):
        found.append(signalled_at(config_in(folder / name), 3, number, of_rank))
        found.append(read_status(folder / name))
        found.append(run(config_in(folder / name)))
    killed_after(config_in(folder / "late"), STEPS, saved=True)
    before = (folder / "late" / "checkpoints" / "step_00000006" / ".metadata").stat().st_mtime_ns
    found.append(run(config_in(folder / "late")))
    after = (folder / "late" / "checkpoints" / "step_00000006" / ".metadata").stat().st_mtime_ns
    found.append(before == after)
    return found


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Any]]]:
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(stop_and_go, 2, folder, timeout=120)


def test_outcomes_are_alike_on_all_ranks(ended: Any) -> None:
    _, of_ranks = ended
    for whole, killed, term, _, term_end, usr1, _, usr1_end, late, untouched in of_ranks:
        for outcome in (whole, killed, term_end, usr1_end):
            assert (outcome.status, outcome.step) == ("finished", STEPS)
        for outcome in (term, usr1):
            assert (outcome.status, outcome.step) == ("stopped", 3)
        assert (late.status, late.step, untouched) == ("finished", STEPS, True)
        assert late.reason == "all 6 steps were done before"
    assert "SIGTERM" in of_ranks[0][2].reason and "another rank" in of_ranks[1][2].reason
    assert "SIGUSR1" in of_ranks[1][5].reason and "another rank" in of_ranks[0][5].reason
    for status in (of_ranks[0][3], of_ranks[0][6]):
        assert (status["status"], status["step"]) == ("stopped", 3)
        assert "told to stop" in status["reason"]


@pytest.mark.parametrize("name", ["killed", "term", "usr1", "late"])
def test_ends_as_if_never_stopped(ended: Any, name: str) -> None:
    folder, _ = ended
    expected = latest_in(folder / "whole" / "checkpoints")
    found = latest_in(folder / name / "checkpoints")
    assert expected is not None and found is not None and found.name == expected.name
    assert_same_tensors(found, expected)
    assert unmeasured(folder / name) == unmeasured(folder / "whole")
    status = read_status(folder / name)
    assert status is not None and (status["status"], status["step"]) == ("finished", STEPS)


def unmeasured(folder: Path) -> list[dict[str, Any]]:
    records = read_records(folder / "metrics.jsonl")
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    return [computed(record) for record in records]


def computed(record: StepRecord) -> dict[str, Any]:
    return {k: v for k, v in json.loads(record.to_json()).items() if k not in MEASURED}


@pytest.mark.parametrize(("name", "step"), [("killed", 2), ("term", 3), ("usr1", 3)])
def test_goes_on_from_the_last_save_and_says_so(ended: Any, name: str, step: int) -> None:
    """A run that was told to stop has saved at that step, one that was killed at the last due."""
    folder, _ = ended
    starts = json.loads((folder / name / "run.json").read_text())["starts"]
    assert [(s["step"], s["reason"]) for s in starts] == [(0, "new run"), (step, "resumed")]


def claim(rank: int, world_size: int, folder: Path) -> str:
    with (
        pytest.raises(ValueError, match="is in use") as caught,
        enter_on_rank_zero(lock_run_folder(folder)),
    ):
        pass
    return str(caught.value)


OWNER = '{"process": 4711, "host": "another-host", "started": 1.0}\n'


def test_a_folder_in_use_is_refused_on_every_rank(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as handle:
        handle.write(OWNER)
        handle.flush()
        fcntl.flock(handle, fcntl.LOCK_EX)
        for message in run_ranks(claim, 2, tmp_path):
            assert f"'{tmp_path}' is in use by process 4711 on another-host; wait" in message
    assert (tmp_path / "lock").read_text() == OWNER


def claim_and_leave(rank: int, world_size: int, folder: Path) -> str:
    with contextlib.suppress(Killed), enter_on_rank_zero(lock_run_folder(folder)):
        raise Killed
    with enter_on_rank_zero(lock_run_folder(folder)):
        return (folder / "lock").read_text()


def test_a_folder_is_free_again_after_a_run(tmp_path: Path) -> None:
    assert run_ranks(claim_and_leave, 1, tmp_path / "new")[0].startswith('{"process": ')


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    before = config_in(tmp_path)
    assert check_same_run(tmp_path, before) == []
    write_config(tmp_path, before)
    write_status(tmp_path, "stopped", 3, "told to stop")
    held = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    other = config_in(tmp_path, "train.seed=9", "model.ffn_hidden_size=64", "optim.lr=0.5")
    with pytest.raises(ValueError, match="holds another run") as caught:
        check_same_run(tmp_path, other)
    message = str(caught.value)
    assert "train.seed was 3, is 9" in message and "model.ffn_hidden_size was 96, is 64" in message
    assert "optim.lr" not in message and "Choose another log.folder" in message
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == held


def test_what_may_change_is_told(tmp_path: Path) -> None:
    write_config(tmp_path, config_in(tmp_path))
    now = config_in(tmp_path, "train.steps=9", "parallel.cp_size=2", "optim.lr=0.5")
    changes = check_same_run(tmp_path, now)
    assert changes == [
        "optim.lr: 0.001 -> 0.5",
        "parallel.cp_size: 1 -> 2",
        "train.steps: 6 -> 9",
    ]


def refused(rank: int, world_size: int, folder: Path) -> list[str]:
    """Messages of starts that must change nothing in the folder."""
    launched(world_size)
    run(config_in(folder / "first", "train.steps=2"))
    words = [
        config_in(folder / "first", "train.steps=2", "train.seed=9"),
        config_in(folder / "second", f"checkpoint.load={folder / 'nowhere'}"),
        config_in(folder / "second", f"checkpoint.load={folder / 'first'}", "model.nheads=2"),
    ]
    messages = []
    for config in words:
        with pytest.raises(ValueError) as caught:
            run(config)
        messages.append(str(caught.value))
    if rank == 0:
        (folder / "first" / "config.toml").write_text("[modle]\n")
    # Neither may read what the other is still writing.
    dist.barrier()
    with pytest.raises(ConfigError) as caught:
        run(config_in(folder / "first", "train.steps=2"))
    messages.append(str(caught.value))
    return [*messages, sorted(path.name for path in folder.iterdir())]  # type: ignore[list-item]


def test_mistakes_are_found_before_anything_is_written(tmp_path: Path) -> None:
    of_ranks = run_ranks(refused, 2, tmp_path)
    file = tmp_path / "first" / "config.toml"
    for other_run, nowhere, architecture, config, folders in of_ranks:
        assert f"{file}: unknown key 'modle'; did you mean 'model'?" in config.splitlines()
        assert "train.seed was 3, is 9" in other_run
        assert "nowhere': does not exist" in nowhere
        assert "model.nheads is 4 there and 2 here" in architecture
        assert folders == ["first"]

"""What keeps a run alive where batch systems, disks and machines do what they like."""

import errno
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lcdist.checkpoint import save as saving
from lcdist.checkpoint import writer
from lcdist.checkpoint.read import CheckpointError, open_checkpoint
from lcdist.checkpoint.save import Checkpointer
from lcdist.commands.train import run
from lcdist.rundir.paths import latest_in
from lcdist.train.trainer import Trainer
from lcdist.utils.digests import damaged_files
from lcdist.verify import preflight as checks
from lcdist.verify.preflight import check_start
from tests.checkpoint.stored import assert_same_tensors
from tests.distributed import run_ranks
from tests.model.small import Meshes, small, take_steps
from tests.train.test_resume import (
    STEPS,
    before_step,
    config_in,
    killed_after,
    launched,
    unmeasured,
)

# --- the file `stop`, and what a batch script reads -----------------------------------------------


@contextmanager
def asked_at(step: int, file: Path) -> Iterator[None]:
    """Within, somebody makes the file while `step` is taken."""
    with before_step(step, 1, file.touch):
        yield


def stop_by_file(rank: int, world_size: int, folder: Path) -> list[Any]:
    launched(world_size)
    config, home = config_in(folder / "asked"), folder / "asked"
    run(config_in(folder / "whole"))
    with asked_at(3, home / "stop"):
        stopped = run(config)
    marks = [sorted(p.name for p in home.iterdir()), (home / "STOPPED").read_text()]
    ended = run(config)
    killed_after(config_in(folder / "lost"), 4, saved=False)
    run(config_in(folder / "lost"))
    return [stopped, marks, ended, sorted(p.name for p in home.iterdir())]


@pytest.fixture(scope="module")
def by_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("stop")
    return folder, run_ranks(stop_by_file, 2, folder)


def test_a_file_stops_all_ranks_at_one_step(by_file: Any) -> None:
    folder, of_ranks = by_file
    for stopped, (names, mark), ended, left in of_ranks:
        assert stopped.status == "stopped" and 3 <= stopped.step <= 4
        assert "STOPPED" in names and "DONE" not in names and "stop" not in names
        said = json.loads(mark)
        assert said["step"] == stopped.step == of_ranks[0][0].step
        assert Path(said["checkpoint"]).name == f"step_{stopped.step:08d}"
        assert ended.status == "finished"
        assert "DONE" in left and "STOPPED" not in left and "stop" not in left
    assert of_ranks[0][0].reason == "told to stop (the file stop)"
    assert unmeasured(folder / "asked") == unmeasured(folder / "whole")


def test_work_that_is_done_again_is_told(by_file: Any) -> None:
    starts = json.loads((by_file[0] / "lost" / "run.json").read_text())["starts"]
    assert [start["lost_steps"] for start in starts] == [0, 2]
    assert starts[1]["step"] == 2 and starts[1]["lost_seconds"] > 0
    assert all(start["first_step_seconds"] > 0 for start in starts)
    assert all(start["before_first_step_seconds"] > 0 for start in starts)
    assert starts[0]["ended"] <= starts[1]["began"] + 60 and starts[1]["saving_seconds"] > 0


# --- saves that are completed later ---------------------------------------------------------------


class SlowWriter:
    """Within, every write waits first; counts how many are under way at once."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait, self.most, self._now, self._lock = wait, 0, 0, threading.Lock()

    def __enter__(self) -> "SlowWriter":
        self.real = writer.filesystem_async.FileSystemWriterAsync.write_preloaded_data
        writer.filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(self)
        return self

    def __exit__(self, *_: object) -> None:
        writer.filesystem_async.FileSystemWriterAsync.write_preloaded_data = self.real

    def __call__(self, transforms: Any, number: int, *more: Any, **words: Any) -> Any:
        with self._lock:
            self._now += number == 0
            self.most = max(self.most, self._now)
        self.wait()
        result = self.real(transforms, number, *more, **words)
        with self._lock:
            self._now -= number == 0
        return result


def save_both_ways(rank: int, world_size: int, folder: Path) -> list[Any]:
    launched(world_size)
    run(config_in(folder / "waits", "checkpoint.keep_last=9"))
    with SlowWriter(lambda: time.sleep(0.3)) as slow:
        words = ("checkpoint.asynchronous=true", "checkpoint.every=1", "checkpoint.keep_last=9")
        run(config_in(folder / "goes on", *words))
    return [slow.most]


def test_what_is_written_meanwhile_is_the_state_of_its_step(tmp_path: Path) -> None:
    most = run_ranks(save_both_ways, 2, tmp_path)
    # One copy at a time: the next save waits for the one before.
    assert most == [[1], [1]]
    for step in (2, 4, 6):
        found, expected = (
            tmp_path / name / "checkpoints" / f"step_{step:08d}" for name in ("goes on", "waits")
        )
        assert open_checkpoint(found).step == step
        assert_same_tensors(found, expected)


def named_between(rank: int, world_size: int, folder: Path) -> Path | None:
    """Return the newest checkpoint when the last save begins, if the one before is complete."""
    launched(world_size)
    step, save, found = Trainer._one_step, Trainer.save, []

    def one_step(self: Trainer, *more: Any) -> Any:
        while self.checkpointer.working:
            time.sleep(0.01)
        return step(self, *more)

    def last_save(self: Trainer, wait: bool = True) -> None:
        found.append(latest_in(self.checkpointer.folder))
        save(self, wait)

    Trainer._one_step, Trainer.save = one_step, last_save  # type: ignore[method-assign]
    try:
        run(config_in(folder, "checkpoint.asynchronous=true", "checkpoint.every=4"))
    finally:
        Trainer._one_step, Trainer.save = step, save  # type: ignore[method-assign]
    return found[-1]


def test_it_has_its_name_after_the_first_step_that_finds_it_written(tmp_path: Path) -> None:
    found = run_ranks(named_between, 2, tmp_path)
    assert found == [tmp_path / "checkpoints" / "step_00000004"] * 2


def saved_once(folder: Path) -> Trainer:
    """Return a trainer that took two steps and saved the first."""
    trainer = Meshes().trainer(small("model.num_layers=1", "checkpoint.asynchronous=true"))
    trainer.checkpointer = Checkpointer(folder, keep_last=2)
    take_steps(trainer, 1)
    trainer.save()
    take_steps(trainer, 1)
    return trainer


def interrupted(rank: int, world_size: int, folder: Path) -> list[Any]:
    trainer = saved_once(folder)
    looked = threading.Event()
    with SlowWriter(looked.wait):
        trainer.save(wait=False)
        before = (trainer.checkpointer.working, trainer.saved_step, latest_in(folder))
        half = [path.name for path in folder.iterdir() if path.name.startswith(".")]
        looked.set()
        trainer._note_saved(trainer.checkpointer.finish())
    return [before, half, trainer.saved_step, latest_in(folder)]


def test_it_has_no_name_before_it_is_whole(tmp_path: Path) -> None:
    for before, half, saved, latest in run_ranks(interrupted, 2, tmp_path):
        assert before == (True, 1, tmp_path / "step_00000001")
        assert half == [".writing-step_00000002"]
        assert (saved, latest) == (2, tmp_path / "step_00000002")


class SlowHashes:
    """Within, files that a save reads back are hashed after `wait`."""

    def __init__(self, wait: Callable[[], Any]) -> None:
        self.wait = wait

    def __enter__(self) -> None:
        self.real = saving.sha256_of_all
        saving.sha256_of_all = self

    def __exit__(self, *_: object) -> None:
        saving.sha256_of_all = self.real

    def __call__(self, files: list[Path]) -> dict[str, str]:
        self.wait()
        return self.real(files)


def hashed_later(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Save while training waits for the writes alone; return what is on disk in between."""
    trainer = Meshes().trainer(small("model.num_layers=1"))
    trainer.checkpointer = Checkpointer(folder / "later", keep_last=9)
    take_steps(trainer, 1)
    looked, seen = threading.Event(), {}
    with SlowHashes(looked.wait):
        trainer.save(wait=False)
        seen["before"] = (trainer.checkpointer.working, latest_in(folder / "later"))
        take_steps(trainer, 1)
        seen["half"] = sorted(path.name for path in (folder / "later").iterdir())
        looked.set()
        trainer.complete_save()
    seen["saved"] = (trainer.saved_step, latest_in(folder / "later"))
    trainer.step = 3

    def fails() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with SlowHashes(fails if rank else lambda: None):
        trainer.save(wait=False)
        trainer.complete_save()
    return seen


def test_a_save_waits_for_its_writes_and_has_its_name_after_its_digests(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    for seen in run_ranks(hashed_later, 2, tmp_path):
        assert seen["before"] == (True, None)
        assert seen["half"] == [".writing-step_00000001"]
        assert seen["saved"] == (1, folder / "step_00000001")
    # Of the second save, rank 0 has read what rank 1 could not.
    for step in (1, 3):
        checkpoint = open_checkpoint(folder / f"step_{step:08d}")
        assert set(checkpoint.manifest["sha256"]) == set(checkpoint.manifest["files"])
        assert not damaged_files(checkpoint.path, checkpoint.manifest["sha256"])
    written = open_checkpoint(folder / "step_00000001").manifest["sha256"]
    assert sum(name.startswith("__1_") for name in written) == 2


def test_an_error_after_a_save_loses_nothing_of_one_rank(tmp_path: Path) -> None:
    assert run_ranks(breaks_after_a_save, 1, tmp_path) == ["no data"]
    assert latest_in(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000002"


def breaks_after_a_save(rank: int, world_size: int, folder: Path) -> str:
    def breaks() -> None:
        raise ValueError("no data")

    launched(world_size)
    with before_step(3, 0, breaks), pytest.raises(ValueError, match="no data") as caught:
        run(config_in(folder))
    return str(caught.value)


# --- what is kept, and disks ----------------------------------------------------------------------


def keep_some(rank: int, world_size: int, folder: Path) -> None:
    launched(world_size)
    words = ("checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3")
    run(config_in(folder, *words))


def test_the_last_and_every_third_are_kept(tmp_path: Path) -> None:
    run_ranks(keep_some, 1, tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_00000003", "step_00000005", "step_00000006"] and STEPS == 6


def disk_full(rank: int, world_size: int, folder: Path) -> list[str]:
    """Return each rank's errors: one rank cannot write; the disk is full before any writing."""
    trainer = saved_once(folder)
    home = writer.filesystem_async.FileSystemWriterAsync
    real, heard = home.write_preloaded_data, []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        home.write_preloaded_data = staticmethod(full)
    with pytest.raises(CheckpointError) as caught:
        trainer.save()
    heard.append(str(caught.value))
    home.write_preloaded_data = real
    disk_usage, saving.shutil.disk_usage = saving.shutil.disk_usage, lambda path: Room(1000)
    with pytest.raises(CheckpointError) as caught:
        trainer.save()
    heard.append(str(caught.value))
    with pytest.raises(ValueError, match="free there and one checkpoint takes 2.00 GiB") as start:
        check_start(folder, 2**31)
    heard.append(str(start.value))
    saving.shutil.disk_usage = disk_usage
    trainer.save()
    return heard


class Room:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_full_disk_is_told_by_all_ranks_and_nothing_is_lost(tmp_path: Path) -> None:
    for rank, heard in enumerate(run_ranks(disk_full, 2, tmp_path)):
        assert "step_00000002 could not be written" in heard[0], rank
        assert "free space or repair the file system" in heard[0]
        assert "no room for a checkpoint" in heard[1] and "free some space" in heard[1]
        assert f"log.folder = '{tmp_path}'" in heard[2]
        # Megatron tells the cause to rank 0 alone.
        assert rank or "No space left on device" in heard[0]
    assert open_checkpoint(tmp_path).step == 2


# --- folders and clocks ---------------------------------------------------------------------------


def apart(rank: int, world_size: int, folder: Path) -> list[Any]:
    own = folder / str(rank)
    own.mkdir()
    with pytest.raises(ValueError, match="not the same folder on all machines") as caught:
        check_start(own, 0, visible_within=0.3)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    checks.log.addHandler(handler)
    clock = time.time
    if rank == 2:
        checks.time.time = lambda: clock() + 100
    try:
        check_start(folder, 0)
    finally:
        checks.time.time = clock
    return [str(caught.value), heard, sorted(path.name for path in folder.iterdir())]


def test_folders_that_are_not_shared_and_clocks_that_differ(tmp_path: Path) -> None:
    said = run_ranks(apart, 3, tmp_path)
    assert all("choose a folder on a file system" in one[0] for one in said)
    assert "+100 s off" in said[0][1][0] and len(said[0][1]) == 1
    assert said[0][2] == ["0", "1", "2"], "nothing is left behind"

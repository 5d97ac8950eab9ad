"""The newest checkpoint of a run folder: named by `latest`, else the one of the greatest step."""

from pathlib import Path

import pytest

from lcdist.rundir.paths import CheckpointError, latest_in, step_of


def make_checkpoints(folder: Path, *steps: int) -> list[Path]:
    folders = [folder / f"step_{step:08d}" for step in steps]
    for each in folders:
        each.mkdir()
    return folders


def test_latest_is_the_one_that_the_pointer_names(tmp_path: Path) -> None:
    _, middle, _ = make_checkpoints(tmp_path, 5, 10, 200)
    (tmp_path / "latest").write_text("step_00000010\n")
    assert latest_in(tmp_path) == middle and step_of(middle) == 10


def test_without_a_pointer_the_greatest_step_is_latest(tmp_path: Path) -> None:
    *_, last = make_checkpoints(tmp_path, 5, 10, 200)
    assert latest_in(tmp_path) == last
    assert latest_in(tmp_path / "missing") is None


def test_pointer_to_nothing_is_an_error(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 5)
    (tmp_path / "latest").write_text("step_00000006\n")
    with pytest.raises(CheckpointError, match="names step_00000006, which does not exist"):
        latest_in(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"..\n", b"step_\n", b"step_1/../x"])
def test_a_damaged_pointer_is_named(content: bytes, tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 5)
    (tmp_path / "latest").write_bytes(content)
    with pytest.raises(CheckpointError, match="latest is damaged: it names no"):
        latest_in(tmp_path)

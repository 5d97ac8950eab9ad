"""An evaluation that was interrupted ends with the same bits as one that was not."""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

from lcdist.evaluate.evaluation import Kept, evaluate_checkpoint
from lcdist.evaluate.unit_file import UnitFile
from tests.distributed import run_ranks
from tests.evaluate.worlds import trained_model, with_data

ASKED = ["evaluate.lengths=[7, 24, 96]", "evaluate.tokens=192"]
UNITS = 6


def trained(rank: int, world_size: int, folder: Path) -> None:
    trained_model(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = with_data(tmp_path_factory.mktemp("resume"))
    run_ranks(trained, 1, folder)
    return folder


class Told:
    """Progress that raises after so many tokens, and remembers how much was done at the start."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.first = limit, -1

    def __call__(self, what: str, completed: int, total: int) -> None:
        if self.first < 0:
            self.first = completed
        if self.limit is not None and completed > self.limit:
            raise KeyboardInterrupt


def interrupted_and_not(
    rank: int, world_size: int, folder: Path, files: Path
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], int]]]:
    """Return the results without interruption, and by interruption the results and the start."""
    os.environ["WORLD_SIZE"] = str(world_size)
    whole = evaluate_checkpoint(folder / "checkpoints", ASKED)
    found = []
    # In the second unit, in the third, and after the last one.
    for limit in (100, 192 + 50, 3 * 192):
        kept = Kept(files / f"{limit}.units.jsonl")
        with contextlib.suppress(KeyboardInterrupt):
            evaluate_checkpoint(folder / "checkpoints", ASKED, Told(limit), kept)
        told = Told()
        found.append((evaluate_checkpoint(folder / "checkpoints", ASKED, told, kept), told.first))
    return whole, found


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_resumed_at_any_unit_it_ends_with_the_same_bits(
    folder: Path, tmp_path: Path, ranks: int
) -> None:
    for whole, found in run_ranks(interrupted_and_not, ranks, folder, tmp_path):
        assert all(result == whole for result, _ in found)
        # Of windows of 7 tokens 14 begin in the first stretch and 13 in the second.
        assert [first for _, first in found] == [98, 189, 189 + 2 * 192]
    for file in tmp_path.iterdir():
        assert len(file.read_text().splitlines()) == 1 + UNITS


def ask(rank: int, world_size: int, folder: Path, file: Path, steps: list[Any]) -> list[Any]:
    """Evaluate once for each step (words, overwrite); return (what was done, result or error)."""
    os.environ["WORLD_SIZE"] = str(world_size)
    found: list[Any] = []
    for words, overwrite in steps:
        told = Told()
        try:
            result = evaluate_checkpoint(
                folder / "checkpoints", [*ASKED, *words], told, Kept(file, overwrite)
            )
            found.append((told.first, result))
        except ValueError as error:
            found.append(str(error))
    return found


def test_another_question_is_refused_unless_overwritten(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.units.jsonl"
    steps = [
        *([], False),
        *(["evaluate.seed=1"], False),
        # What is measured, and how it is logged, is no part of the question of a unit.
        *(["evaluate.measure=[perplexity]", "log.tensorboard=true"], False),
        *(["evaluate.seed=1"], True),
        *([], False),
    ]
    pairs = list(zip(steps[::2], steps[1::2], strict=True))
    for first, refused, same, new, back in run_ranks(ask, 2, folder, file, pairs):
        total = 189 + 2 * 192
        assert first[0] == 0 and new[0] == 0 and same == (total, first[1])
        assert refused == (
            f"{file} has what another evaluation measured (evaluate.seed was 0, is 1): delete it, "
            "or add --overwrite to measure everything again"
        )
        assert "evaluate.seed was 1, is 0" in back


def test_a_part_is_named_once_and_at_least_one(folder: Path, tmp_path: Path) -> None:
    measures = (["evaluate.measure=[]"], ["evaluate.measure=[perplexity, perplexity]"])
    [errors] = run_ranks(
        ask, 1, folder, tmp_path / "x.units.jsonl", [(words, False) for words in measures]
    )
    assert errors == [
        "evaluate.measure = []: name at least one part, such as [perplexity]",
        "evaluate.measure names 'perplexity' twice: name it once",
    ]


def test_mistakes_leave_no_file_and_other_lengths_are_named(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.units.jsonl"
    [[error]] = run_ranks(ask, 1, folder, file, [(["evaluate.tokens=1000000"], False)])
    assert "evaluate.tokens = 1000000" in error and not file.exists()
    steps = [([], False), (["evaluate.lengths=[8]", "data.path=nowhere"], False)]
    [[_, error]] = run_ranks(ask, 1, folder, file, steps)
    assert "data.path was" in error and "evaluate.lengths was [7, 24, 96], is [8]" in error


def test_what_is_cut_short_or_damaged_is_noticed(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.units.jsonl"
    [[(_, whole)]] = run_ranks(ask, 1, folder, file, [([], False)])
    lines = file.read_bytes().splitlines(keepends=True)
    for cut in (1, 20):
        file.write_bytes(b"".join(lines)[:-cut])
        [[again]] = run_ranks(ask, 1, folder, file, [([], False)])
        assert again == (189 + 192 + 96, whole) and file.read_bytes().splitlines() == [
            line.strip() for line in lines
        ]
    head_only = lines[0][:50]
    file.write_bytes(head_only)
    [[again]] = run_ranks(ask, 1, folder, file, [(["evaluate.seed=5"], False)])
    assert again[0] == 0
    flipped = lines[2].replace(b"1", b"2", 1)
    for number, damage in ((2, b"{}\n"), (2, b"\xff\n"), (2, flipped), (1, b'{"a": 1}\n')):
        bad = [*lines]
        bad[number - 1] = damage
        file.write_bytes(b"".join(bad))
        [[error]] = run_ranks(ask, 1, folder, file, [([], False)])
        assert error.startswith(f"{file}:{number}: ") and "--overwrite" in error


def test_two_evaluations_do_not_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.units.jsonl"
    with UnitFile(file, {"a": 1}) as first, UnitFile(file, {"a": 1}) as second:
        first.add("part", "key", {"x": 0.1})
        with pytest.raises(FileExistsError):
            second.add("part", "key", {"x": 0.1})
        with pytest.raises(ValueError, match="in use by another"):
            UnitFile(file, {"a": 1})
    with UnitFile(file, {"a": 1}) as again:
        assert again.measured == {("part", "key"): {"x": 0.1}}
    with file.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_numbers_that_are_not_finite_and_all_bits_come_back(tmp_path: Path) -> None:
    file = tmp_path / "x.units.jsonl"
    values = {"x": [0.1 + 0.2, 5e-324, float("inf"), 1.0], "n": 2**53 + 1}
    with UnitFile(file, {}) as first:
        first.add("part", "a\nb", {**values, "nan": float("nan")})
    with UnitFile(file, {}) as again:
        found = again.measured["part", "a\nb"]
    assert found.pop("nan") != found and found == values
    assert len(file.read_text().splitlines()) == 2 and json.loads(file.read_text().splitlines()[1])

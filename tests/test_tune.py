"""Timing of other tiles: which are tried, that they are launched, and what is told of them."""

import csv
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from lcdist_kernels import triton_common
from lcdist_kernels.triton_common import Launch, choose_launch
from tests.interpreter import interpret_without_gpu

interpret_without_gpu()
sys.path.append(str(Path(__file__).parents[1] / "kernels" / "bench"))
tune = import_module("tune")
Size = tune.Size

SIZES = [Size(16384, 32, 8, 128), Size(16384, 32, 8, 64)]
NAMES = list(map(str, tune.parts()))


def part_named(name: str) -> Any:
    return tune.parts()[NAMES.index(name)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"d{size.head_dim}")
@pytest.mark.parametrize("name", NAMES)
def test_a_candidate_is_what_is_launched(
    name: str, size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_common, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(tune, "HAS_GPU", True)
    part = part_named(name)
    x = torch.empty(1, 1, 1, size.head_dim, dtype=torch.bfloat16)

    def launched() -> Launch:
        hopper = getattr(part.home, f"{part.table}_HOPPER", None)
        return choose_launch(getattr(part.home, part.table), x, hopper)

    own = launched()
    tried = part.candidates(size)
    assert tried[0] == own and len(tried) == len(set(tried)) > 12
    with pytest.raises(KeyError), part.using(size, tried[-1]):
        assert launched() == tried[-1] != own
        raise KeyError
    assert launched() == own


def test_every_table_has_its_part() -> None:
    homes = {part.home for part in tune.parts()}
    assert len(homes) == 4
    tables = {
        f"{home.__name__.split('.')[-2]}.{table}"
        for home in homes
        for table in vars(home)
        if table.isupper() and not table.endswith(("_HOPPER", "_TABLES", "_DESCRIBED"))
    }
    # The costs of blocks are a small part of the time, so their tiles are not tuned.
    tables.discard("landmark.TOP_K")
    assert tables == set(NAMES)


def test_a_word_that_is_no_table_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"--only fall: the tables are full\.FWD, full\.BWD_DKV"):
        tune.items(["full.FWD", "fall"], [128])
    assert {str(part) for part, *_ in tune.items(["lssar", "full.FWD"], [64])} == {
        *("lssar.FWD", "lssar.BWD_DKV", "lssar.BWD_DQ", "lssar.SUMS", "full.FWD"),
    }


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "tuning.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.exhaustive
def test_the_whole_of_it_as_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Children run here, one after another; the second candidate's process dies."""
    monkeypatch.setattr(tune, "HAS_GPU", False)
    statuses = []

    def relayed(child: Any, mark: Path, log: Path, end: float, lost: Any) -> bool:
        monkeypatch.setattr(sys, "argv", [*child[1:], "--first", "0", "--seconds", "60"])
        statuses.append(tune.main())
        lost(1, "its process ended with status -11")
        return True

    monkeypatch.setattr(tune, "relay", relayed)
    words = ["tune.py", "--out", str(tmp_path), "--only", "full.FWD", "lssar.BWD_DQ"]
    monkeypatch.setattr(sys, "argv", words)
    assert tune.main() == 0 and set(statuses) == {0}
    rows = rows_in(tmp_path)
    told = [(row["table"], row["own"], bool(row["ms"]), row["note"]) for row in rows]
    died = "its process ended with status -11"
    assert told == [
        ("full.FWD", "1", True, ""),
        ("full.FWD", "0", True, ""),
        ("lssar.BWD_DQ", "1", True, ""),
        ("lssar.BWD_DQ", "0", True, ""),
        ("full.FWD", "0", False, died),
    ]
    assert all(float(row["error"]) < 1e-5 for row in rows if row["ms"])
    said = capsys.readouterr().out
    assert "4 candidates" in said and "all were timed" in said


def test_a_candidate_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> float:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(tune, "gate", refuse)
    item = tune.items(["full.FWD"], [128])[0]
    assert tune.measured(item) == {"note": "RuntimeError: out of resource: shared memory"}
    tune.passes(item)


def test_what_is_faster_by_more_than_noise_is_told(tmp_path: Path) -> None:
    item = (part_named("full.BWD_DKV"), SIZES[0], Launch(64, 64, 8, 2))

    def add(ms: float | str, own: int, stages: int, gpu: str = "made up") -> None:
        row = tune.blank(item, {"gpu": gpu}) | {"ms": ms, "own": own, "num_stages": stages}
        tune.write("tuning", [row], tmp_path)

    file = tmp_path / "tuning.csv"
    add(10.0, 1, 2)
    add(9.9, 0, 3)
    add("", 0, 4)
    add(5.0, 0, 5, gpu="another")
    assert tune.faster(file, {"gpu": "made up"}) == ["the tables' own are best"]
    assert tune.faster(file, {"gpu": "none of them"}) == ["nothing was timed"]
    add(7.5, 0, 1)
    assert tune.faster(file, {"gpu": "made up"}) == [
        "full.BWD_DKV d 128: Launch(64, 64, 8, 1) takes 0.75 of the time"
    ]

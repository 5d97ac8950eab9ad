"""The short form of `make chaos`, and a longer one; both fail with what did not survive."""

import random
from pathlib import Path

import pytest

from tests.chaos.__main__ import KINDS, main
from tests.chaos.damages import try_damages
from tests.chaos.inputs import CORPUS, Kind, keep_input, try_inputs
from tests.chaos.kills import WAYS, try_kills
from tests.chaos.tally import REFUSED, Tally, failures, table

BY_NAME = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def assert_all_survive(*tallies: Tally) -> None:
    assert sum(tally.tried for tally in tallies) and not failures(tallies), "\n".join(
        failures(tallies)
    )


def test_killed_runs_end_like_undisturbed_ones(tmp_path: Path) -> None:
    """One rank whose saves are asynchronous; two ranks take longer."""
    drawn = (0.5, random.Random(2))
    assert_all_survive(*try_kills(tmp_path, 2, drawn, ways=WAYS[1:2], most=2))


def test_damaged_files_are_noticed(tmp_path: Path) -> None:
    assert_all_survive(*try_damages(tmp_path, 1, random.Random(1), most=4))


@BY_NAME
def test_generated_inputs_end_in_order(kind: Kind) -> None:
    """All inputs that failed once, and a few new ones."""
    assert_all_survive(try_inputs(kind, kind.count // 50, with_seed=0))


@pytest.mark.exhaustive
def test_more_kills(tmp_path: Path) -> None:
    assert_all_survive(*try_kills(tmp_path, 8, (1.0, random.Random(3)), most=3))


@pytest.mark.exhaustive
def test_more_damages(tmp_path: Path) -> None:
    assert_all_survive(*try_damages(tmp_path, 1, random.Random(4), most=18))


@pytest.mark.exhaustive
@BY_NAME
def test_more_generated_inputs(kind: Kind) -> None:
    assert_all_survive(try_inputs(kind, kind.count // 8, with_seed=1, replay=False))


# --- the counting itself --------------------------------------------------------------------------


def test_every_kept_input_is_of_a_kind() -> None:
    assert {path.name for path in CORPUS.iterdir() if path.is_dir()} <= {k.folder for k in KINDS}


def test_an_input_that_fails_is_counted_kept_and_tried_again(tmp_path: Path) -> None:
    kind = KINDS[0]

    def attempt(value: dict, folder: Path) -> str | None:
        return {3: "odd", 4: REFUSED}.get(value["world"])

    odd = Kind("odd", "", 0, kind.inputs, attempt)
    tally = try_inputs(odd, 60, with_seed=0, keep=tmp_path)
    kept = list((tmp_path / "odd").iterdir())
    assert tally.tried >= 60 and 0 < len(kept) <= len(tally.failures) < tally.tried
    row = f"| odd | {tally.tried} | {tally.tried - len(tally.failures)} | {tally.refused} | 1 |"
    assert tally.refused > 0 and row in table([tally]).splitlines()
    assert keep_input(tmp_path / "odd", {"world": 3}).is_file()


def test_the_command_writes_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--only", "tokenizers", "--inputs-share", "0.01", "--out", str(tmp_path / "table.md")]
    assert main(words) == 0
    written = (tmp_path / "table.md").read_text()
    assert "| tokenizers | " in written and "0.01 of the full counts" in written
    assert written in capfd.readouterr().out

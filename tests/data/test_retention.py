"""How much of a text can teach a context: equal to a naive count, and shown where one looks."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from lcdist.commands.main import main
from lcdist.data.datasets.split import TokenSplit
from lcdist.data.meta import META, read_meta, write_meta
from lcdist.data.prepare.retention import retention, retention_line, retention_table


def naive(lengths: list[int]) -> dict[str, object]:
    contexts = [2**k for k in range(9, 30) if max(lengths, default=0) >= 2**k]
    rows = [[c, sum(n >= c for n in lengths), sum(n for n in lengths if n >= c)] for c in contexts]
    return {"longest": max(lengths, default=0), "at_least": rows}


@pytest.mark.parametrize(
    "lengths",
    [
        [],
        [511],
        [512],
        [513, 1024, 1023, 4096],
        [random.Random(n).randrange(1, 9000) for n in range(99)],
    ],
    ids=len,
)
def test_equals_a_naive_count(lengths: list[int]) -> None:
    assert retention(np.array(lengths, np.int32)) == naive(lengths)


def test_tokens_of_long_documents_are_counted_beyond_32_bits() -> None:
    assert retention(np.full(3, 2**30, np.int32))["at_least"][-1] == [2**30, 3, 3 * 2**30]


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Tokenize documents of many lengths as bytes."""
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text("x" * (number**3 // 6 + 1))
    words = ["tokenize", str(tmp_path / "text"), str(tmp_path / "tokens"), "--workers", "1"]
    assert main([*words, "--tokenizer", "bytes", "--valid-fraction", "0.2"]) == 0
    return tmp_path / "tokens"


def test_tokenizing_records_and_prints_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = capsys.readouterr().out.splitlines()
    meta = read_meta(folder)
    assert meta.lengths is not None and {*meta.lengths} == {"train", "valid"}
    for split, found in meta.lengths.items():
        assert found == naive(TokenSplit(folder, split).document_lengths.tolist())
    assert printed[-len(retention_table(folder, meta)) :] == retention_table(folder, meta)
    rows = [line.split() for line in printed if line[:2] == "  " and "context" not in line]
    assert [int(row[0].replace(",", "")) for row in rows] == [512, 1024, 2048, 4096, 8192]
    assert rows[0][2].replace(",", "") == str(meta.lengths["train"]["at_least"][0][2])


def test_older_folders_are_counted_when_they_are_shown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = read_meta(folder)
    expected = retention_line(folder, meta)
    write_meta(folder, dataclasses.replace(meta, lengths=None))
    table = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps({k: v for k, v in table.items() if k != "lengths"}))
    assert read_meta(folder).lengths is None
    capsys.readouterr()
    assert main(["check", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"  {expected}"
    assert "tokens in documents of at least 512: 9" in expected and "the longest has " in expected


def test_shares_below_one_percent_are_not_shown_as_nothing(folder: Path) -> None:
    meta = read_meta(folder)
    rows = [[512, 5, 9_000], [1024, 1, 7]]
    lengths = {"train": {"longest": 1025, "at_least": rows}}
    meta = dataclasses.replace(meta, lengths=lengths, tokens={"train": 10_000})
    assert retention_line(folder, meta) == (
        "tokens in documents of at least 512: 90 %, 1,024: 0.07 %; the longest has 1,025"
    )
    short = dataclasses.replace(meta, lengths={"train": {"longest": 80, "at_least": []}})
    assert retention_table(folder, short) == ["no document has 512 tokens; the longest has 80"]
    wrong = dataclasses.replace(meta, lengths={"train": {"longest": 3}})
    with pytest.raises(ValueError, match="lengths.train: key 'at_least' is missing; remove the"):
        retention_line(folder, wrong)

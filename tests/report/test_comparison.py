"""Pages about evaluations and several runs: every form of file, side by side, without network."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from lcdist.commands.main import main
from lcdist.report.comparison import distinct_names, write_comparison
from lcdist.report.evaluation_file import read_evaluations
from lcdist.report.sections import write_report
from tests.report.test_report import EVALUATION, Resources, make_stage

EVIL = "<script>alert('x')</script>"


def perplexity(*values: float | None) -> dict[str, Any]:
    lengths = [64 * 2**i for i in range(len(values))]
    intervals = [None if v is None else [v - 1, v + 1] for v in values]
    return {
        **{"lengths": lengths, "perplexity": [*values], "interval": intervals},
        **{"scored": [100] * len(values), "joined": False},
    }


POSITION = {
    **{"length": 64, "windows": 3, "first": [1, 33], "last": [32, 64]},
    **{"loss": [3.0, None], "interval": [[2.5, 3.5], None], "scored": [96, 96]},
}
LONGPPL = {
    **{"length": 64, "longppl": 2.5, "interval": [2.0, 3.0], "key_tokens": 7, "in_reach": 100},
    **{"key_share": 0.07, "not_finite": 0, "perplexity": 9.0, "perplexity_interval": [8.0, 10.0]},
    **{"scored": 190, "marker": EVIL, "short_context": 16, "short_step": 8},
    **{"key_gain": 2.0, "key_loss": 2.0},
}


def single(**measured: Any) -> dict[str, Any]:
    return {
        **{"checkpoint": f"runs/{EVIL}/step_3", "step": 3, "tokens": 192, "seed": 0},
        **{"attention": "full", "version": "0.1", "measured": measured},
    }


def written(path: Path, table: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table))
    return path


def text_of(page: Path) -> str:
    """Return a page after checking that it loads nothing and holds no markup of others."""
    text = page.read_text()
    found = Resources(text)
    assert not {"script", "link", "img", "iframe"} & {*found.tags}
    assert all(address.startswith("#") for address in found.addresses)
    assert "http" not in text and "@import" not in text and not found.unnamed
    assert len(found.ids) == len({*found.ids})
    return text


def test_evaluations_and_runs_stand_side_by_side(tmp_path: Path) -> None:
    make_stage(tmp_path / "one", 512, 30, random.Random(1))
    make_stage(tmp_path / "two" / "pretrain", 512, 12, random.Random(1))
    make_stage(tmp_path / "two" / "extend", 4096, 12, random.Random(1))
    # As `lcdist evaluate` writes it for a run, by Slurm; and as `lcdist extend` does.
    written(tmp_path / "one" / "evaluation.json", single(perplexity=perplexity(8.0, 7.5)))
    written(tmp_path / "two" / "evaluation.json", EVALUATION)
    pair = {
        "before": single(perplexity=perplexity(9.0, None, 6.25)),
        "after": single(longppl=LONGPPL),
    }
    file = written(tmp_path / "more" / "pair.json", pair)
    page = write_comparison([tmp_path / "one", tmp_path / "two", file], tmp_path / "c.html")
    text = text_of(page)
    head = re.search(r"<h2>Perplexity by length.*?</thead>", text, re.DOTALL)
    assert head is not None
    columns = re.findall(r'<th scope="col">([^<]*)</th>', head[0])
    assert columns == [
        "length",
        "one",
        "two, before",
        "two, after &lt;extension&gt;",
        "pair, before",
    ]
    row = re.search(r"<tr><td>64</td>.*?</tr>", text)
    assert row is not None
    cells = re.findall(r"<td>([^<]*)</td>", row[0])
    assert cells == ["64", "8.000 (7.000 to 9.000)", "", "", "9.000 (8.000 to 10.00)"]
    assert re.search(r"<tr><td>128</td>.*not finite</td></tr>", text)
    assert "LongPPL" in text and "2.500 (2.000 to 3.000)" in text and "7 (7.0%)" in text
    assert re.search(r"<td>one</td><td>512</td><td>30</td>", text)
    assert re.search(r"<td>two</td><td>4,096, 512</td>|<td>two</td><td>512, 4,096</td>", text)


def test_the_same_text_gives_a_ratio_with_a_narrow_interval(tmp_path: Path) -> None:
    nats = ([20.0, 60.0, 40.0], [19.0, 58.0, 39.0], [10.0, None, 20.0])
    weights = [10, 20, 10]

    def of_text(text: str, values: list[float | None]) -> dict[str, Any]:
        pairs = [[w, x] for w, x in zip(weights, values, strict=True)]
        return single(perplexity={**perplexity(8.0), "text": text, "stretches": [pairs]})

    files = [
        written(tmp_path / f"{name}.json", of_text(text, values))
        for name, text, values in (
            ("a", "same", nats[0]),
            ("b", "same", nats[1]),
            ("c", "other", nats[1]),
            ("d", "same", nats[2]),
        )
    ]
    text = text_of(write_comparison(files, tmp_path / "x.html"))
    head, row = re.findall(r"<thead>.*?</tbody>", text, re.DOTALL)[-1].split("<tbody>")
    assert re.findall(r'<th scope="col">([^<]*)</th>', head) == ["length", "b / a", "d / a"]
    # Differences of -1, -2, -1 nats for 10, 20, 10 tokens: their mean is exactly -0.1 everywhere.
    assert re.findall(r"<td>([^<]*)</td>", row) == ["64", "0.9048 (0.9048 to 0.9048)", "–"]
    assert "a / b" not in text_of(write_comparison([files[0], files[2]], tmp_path / "y.html"))


def test_the_report_of_a_run_shows_what_was_evaluated(tmp_path: Path) -> None:
    make_stage(tmp_path / "one", 512, 30, random.Random(1))
    written(
        tmp_path / "one" / "evaluation.json", single(perplexity=perplexity(8.0), position=POSITION)
    )
    text = text_of(write_report(tmp_path / "one"))
    assert "has not been evaluated" not in text
    assert "8.000 (7.000 to 9.000)" in text and "3.000 (2.500 to 3.500)" in text


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    old = {
        **{"checkpoint": "a", "step": 3, "lengths": [64, 128], "perplexity": [8.0, 7.0]},
        **{"scored": [128, 128], "tokens": 128, "attention": "full", "joined": True},
    }
    [found] = read_evaluations(written(tmp_path / "old.json", old))
    assert found.measured["perplexity"]["perplexity"] == [8.0, 7.0]
    assert found.facts["step"] == 3 and "seed" not in found.facts


@pytest.mark.parametrize("value", [None, 0.0, 1e300])
def test_figures_of_no_and_of_huge_numbers_are_drawn(tmp_path: Path, value: float | None) -> None:
    table = single(perplexity=perplexity(value, value), position={**POSITION, "loss": [value] * 2})
    file = written(tmp_path / "x.json", table)
    assert (
        "nan"
        not in text_of(write_comparison([file], tmp_path / "x.html")).lower().split("</svg>")[-1]
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([], "expected an object, got list"),
        ({"before": single()}, "after: expected an object, got NoneType"),
        (single() | {"step": "3"}, "step = .*: expected a whole number"),
        (single() | {"measured": [1]}, "measured = .*: expected an object"),
        (single(perplexity={"lengths": [1]}), "measured.perplexity is not what 'lcdist evaluate'"),
        (single(position=POSITION | {"first": 3}), "measured.position is not what"),
        (single(longppl=LONGPPL | {"key_tokens": "7"}), "measured.longppl is not what"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, table: Any, message: str) -> None:
    file = written(tmp_path / "bad.json", table)
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}.*{message}.*remove the file"):
        write_comparison([file], tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_names_are_as_short_as_they_can_be() -> None:
    paths = [Path("/runs/a/x.json"), Path("/runs/b/x.json"), Path("/runs/b/y")]
    assert distinct_names(paths[1:]) == ["x", "y"]
    assert distinct_names(paths) == ["a/x", "b/x", "b/y"]
    with pytest.raises(ValueError, match="is named twice: name it once"):
        distinct_names([paths[0], paths[1], paths[0]])


def test_the_command_writes_where_it_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_stage(tmp_path / "one", 512, 30, random.Random(1))
    file = written(tmp_path / "x.json", single(perplexity=perplexity(8.0)))
    for words, page in (
        (["one"], "one/report.html"),
        (["one", "--output", "r.html"], "r.html"),
        (["x.json"], "x.html"),
        (["one", "x.json"], "comparison.html"),
        (["x.json", "one", "--output", "y.html"], "y.html"),
    ):
        assert main(["report", *words]) == 0
        assert capsys.readouterr().out == f"{page}\n" and text_of(Path(page))
    assert main(["report", "x.json", str(file)]) == 2
    assert "x.json is named twice: name it once" in capsys.readouterr().err
    assert main(["report", "x.json", "--output", "no/where.html"]) == 2

"""Tables made from rows have the rows' figures, and the chooser the plan's."""

import csv
import json
import math
import re
from pathlib import Path

import pytest

from docs.generate import benchmarks, blocks, claims, growth, methods, smollm2
from docs.generate.readme import README, with_tables
from docs.generate.rows import LIBRARY, PRESETS, RESULTS, Row, faster_from, timed
from lcdist.attention import METHODS
from lcdist.attention.registry import BUILT_IN

LABELS = {preset.label: preset for preset in PRESETS} | {"torch's own (cuDNN)": LIBRARY}


def cells_of(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table's rows."""
    rows = [re.split(r"(?<!\\) \| ", line[2:-2]) for line in table.splitlines() if line[:2] == "| "]
    return [row for row in rows[1:] if not set("".join(row)) <= set("-:")]


def latest_row(method: str, contender: str, seqlen: int) -> Row | None:
    """Return the last row of a contender that belongs to the last timed run in its file."""
    with (RESULTS / f"{method}.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["fwd_ms"]]
    run = [rows[-1][key] for key in ("gpu", "date", "commit")]
    found = [
        row
        for row in rows
        if [row["gpu"], row["date"], row["commit"]] == run
        and (row["contender"], int(row["seqlen"]), row["head_dim"]) == (contender, seqlen, "128")
    ]
    return found[-1] if found else None


def test_every_figure_of_the_readme_is_that_of_its_row() -> None:
    text = README.read_text(encoding="utf-8")
    section = text.partition("## Measured")[2].partition("## Limits")[0]
    rows = cells_of(section)
    assert [row[0] for row in rows] == ["torch's own (cuDNN)", *(p.label for p in PRESETS)]
    checked = 0
    for label, *cells in rows:
        ways = [(n, way) for n in (32768, 131072) for way in ("fwd", "bwd")]
        for cell, (length, way) in zip(cells, ways, strict=True):
            row = latest_row(LABELS[label].method, LABELS[label].contender, length)
            if row is None or not row[f"{way}_ms"]:
                assert cell == "unmeasured"
                continue
            found = re.fullmatch(r"([\d.,]+) ms \((\d+)\)", cell)
            assert found, cell
            shown, rate = float(found[1].replace(",", "")), float(found[2])
            assert shown == pytest.approx(float(row[f"{way}_ms"]), rel=0.005)
            assert abs(rate - float(row[f"{way}_tflops"])) <= 0.5
            assert all(word in section for word in (row["gpu"], row["date"], row["commit"]))
            checked += 1
    assert checked > 20


def test_the_readmes_tables_are_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_tables(text) == text, "run python -m docs.generate"


def test_numbers_are_rounded_to_three_digits() -> None:
    shown = [benchmarks.significant(value) for value in (1.9963, 18.36, 99.96, 297.9, 1858.2)]
    assert shown == ["2.00", "18.4", "100", "298", "1,858"]


def test_what_no_row_has_is_unmeasured(tmp_path: Path) -> None:
    assert timed(PRESETS[0], tmp_path) == {}
    assert faster_from(PRESETS[0], tmp_path) == "unmeasured"
    head = (RESULTS / "full.csv").read_text().splitlines()[0]
    row = dict.fromkeys(head.split(","), "1") | {"gpu": "G", "date": "D", "commit": "C"}
    ours = row | {"contender": "lcdist full", "head_dim": "128", "fwd_ms": "1", "bwd_ms": "1"}
    with (tmp_path / "full.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, head.split(","))
        writer.writeheader()
        for length, factor in ((1024, 3), (4096, 1)):
            writer.writerow(ours | {"seqlen": str(length), "fwd_ms": str(factor)})
            writer.writerow(
                ours | {"seqlen": str(length), "contender": "torch sdpa"} | {"fwd_ms": "2"}
            )
    # 4 / 3 and 2 / 3 of the library's time: 1,024 x 4 ** (ln(4 / 3) / ln 2) = 1,820 tokens.
    assert faster_from(PRESETS[0], tmp_path) == "1,800"


def test_every_row_of_a_gpu_is_on_the_page() -> None:
    page = benchmarks.gpu_runs()
    for method in METHODS:
        for row in benchmarks.read(f"{method}.csv"):
            assert f"{row['gpu']}, {row['date']}, commit {row['commit']}" in page
            shown = f"| `{row['contender']}` | {int(row['seqlen']):,} | {row['head_dim']} |"
            assert f"{shown} {row['fwd_ms'] or 'unmeasured'} |" in page


@pytest.mark.parametrize(
    "name", [name for name in blocks.MAKERS if name.startswith(("cpu", "gpu"))]
)
def test_tables_of_rows_have_rows_and_say_when_they_were_measured(name: str) -> None:
    made = blocks.MAKERS[name]()
    assert cells_of(made) and re.search(r"20\d\d-\d\d-\d\d", made)
    assert len({line.count(" | ") for line in made.splitlines() if line[:2] == "| "}) <= 2


def test_the_chooser_has_each_method_and_what_is_known_of_it() -> None:
    table = {row[0]: row[1:] for row in cells_of(methods.chooser())}
    assert list(table) == [preset.label for preset in PRESETS]
    assert {preset.method for preset in PRESETS} == {method.name for method in BUILT_IN}
    assert table["`full`"][:4] == ["1.00"] * 4
    # CoCA's tau is half a key; LSSAR keeps directions in fp32 and sends keys twice.
    assert table["`coca`"][2:4] == ["0.75", "0.75"]
    assert table["`lssar`"][0] == table["`lssar`"][3] == "1.50"
    # SCCA is read densely; landmark attention with top_k keeps one key more for 64.
    assert table["`scca` fixed"][3] == "1.00"
    assert table["`landmark` block size 64, top k 64"][3] == "1.01"


def test_readings_of_a_real_model_are_shown_when_there_are_some(tmp_path: Path) -> None:
    assert "unmeasured" in smollm2.smollm2_table(tmp_path)
    folder = tmp_path / "claims" / "smollm2"
    folder.mkdir(parents=True)
    (folder / "facts.json").write_text(json.dumps({"date": "2026-11-29"}))
    for name, nats in (("as-it-is", (200.0, 240.0)), ("coca", (210.0, 250.0))):
        pieces = [[[100, 300.0]] * 2, [[100, each] for each in nats]]
        found = {"lengths": [512, 1024], "perplexity": [20.1, 9.0], "scored": [200, 200]}
        table = {"measured": {"perplexity": {**found, "stretches": pieces}}}
        (folder / f"{name}.json").write_text(json.dumps(table))
    made = smollm2.smollm2_table(tmp_path)
    rows = {row[0]: row[1:] for row in cells_of(made)}
    # Ten nats more in 100 tokens are a factor of exp(0.1).
    assert rows["as it is"][:2] == ["20.10", "9.00"] and rows["`coca`"][2].startswith("1.105")
    assert rows["`lssar`"] == ["unmeasured"] * 3 and "date: `2026-11-29`" in made


def test_claims_are_shown_when_there_are_results(tmp_path: Path) -> None:
    assert "unmeasured" in claims.claims_results(tmp_path)
    folder = tmp_path / "claims" / "cpu"
    folder.mkdir(parents=True)
    answers = {"coca-steady": {"word": "reproduced", "why": "1 | 2"}}
    table = {"facts": {"date": "2026-11-29"}, "claims": answers}
    (folder / "README.md").write_text("# Claims\n")
    assert claims.claims_results(tmp_path).endswith("[Claims](../claims/cpu/README.md)")
    (folder / "results.json").write_text(json.dumps(table))
    made = claims.claims_results(tmp_path)
    [row] = cells_of(made)
    assert row[0] == "`coca-steady`" and row[2:] == ["reproduced", "1 \\| 2"]
    assert "1 reproduced" in made and "(../claims/cpu/README.md)" in made


def test_growth_of_small_models_is_paired_by_pieces_of_text(tmp_path: Path) -> None:
    assert "unmeasured" in growth.claims_growth(tmp_path)
    folder = tmp_path / "claims" / "cpu"
    folder.mkdir(parents=True)

    def reading(**nats: float) -> dict:
        lengths = {"256": nats["own"], "1024": nats["middle"], "4096": nats["far"]}
        return {
            "perplexity": {at: {"value": math.exp(n / 100)} for at, n in lengths.items()},
            "pieces": {at: [[100, n], [100, n]] for at, n in lengths.items()},
        }

    readings = {
        "full": reading(own=200.0, middle=230.0, far=260.0),
        "landmark-k4": reading(own=210.0, middle=210.0, far=220.0),
        "extend-full": reading(own=200.0, middle=210.0, far=220.0),
        "extend-s2": reading(own=200.0, middle=220.0, far=220.0),
    }
    # A perplexity that is not finite is left out of the results.
    lost = reading(own=200.0, middle=200.0, far=200.0)
    readings["lssa"] = {key: {"256": found["256"]} for key, found in lost.items()}
    measured = {"length": 256, "unigram": 300.0, "decides": True, "readings": readings}
    (folder / "results.json").write_text(json.dumps({"measured": measured}))
    made = growth.claims_growth(tmp_path)
    trained, extended = made.split(" extended to ")
    rows = {row[0]: row[1:] for row in cells_of(trained)}
    assert rows["`full`"][:2] == ["7.39", "13.46"] and rows["`full`"][2].startswith("1.822")
    assert rows["`landmark-k4`"][2].startswith("1.105") and "(../claims/cpu/README.md)" in made
    assert rows["`lssa`"] == ["7.39", "not finite", ""]
    assert [row[:2] for row in cells_of(extended)] == [["`s2`", "9.03"], ["`full`", "8.17"]]
    assert cells_of(extended)[0][2].startswith("1.105")

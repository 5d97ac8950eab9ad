"""Test the columns of a benchmark row besides times, the crossover lengths, and gpu-check."""

import csv
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.interpreter import interpret_without_gpu

interpret_without_gpu()
sys.path.append(str(Path(__file__).parents[1] / "kernels" / "bench"))

gpu_measure, gpu_check, gpu_harness = map(
    import_module, ("gpu_measure", "gpu_check", "gpu_harness")
)
crossover, harness = map(import_module, ("crossover", "harness"))
Point = crossover.Point


@pytest.mark.parametrize(
    ("spans", "length"),
    [
        ([], 0),
        ([(1, 3)], 2),
        ([(4, 6), (1, 3)], 4),
        ([(1, 5), (2, 3), (4, 7)], 6),
        ([(1, 2), (1, 2), (2, 3)], 2),
    ],
)
def test_time_during_which_the_device_runs(spans: list[tuple[float, float]], length: float) -> None:
    assert gpu_measure.covered(spans) == length


def test_passes_run_once_each_and_the_backward_takes_the_forwards_result() -> None:
    calls: list[Any] = []
    passes = gpu_measure.Passes(lambda: calls.append("fwd") or "out", calls.append)
    assert passes.each(lambda run: run() or "none") == ["out", "none"]
    assert calls == ["fwd", "out"]
    assert gpu_measure.Passes(lambda: 1, None).each(lambda run: run()) == [1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1980, 512.27\n", ["1980", "512.27"]),
        ("1980, [N/A]\n", ["1980", ""]),
        ("No devices were found\n", ["", ""]),
        ("", ["", ""]),
    ],
)
def test_clock_and_power_are_read_from_the_driver(text: str, expected: list[str]) -> None:
    assert list(gpu_measure.read_state(text).values()) == expected


@pytest.mark.parametrize(
    ("points", "length", "text"),
    [
        ([], None, "unmeasured"),
        ([(4096, 0.5), (8192, 0.4)], 4096, "4,096 or less"),
        ([(4096, 2.0), (16384, 0.5)], 8192, "8,200"),
        ([(4096, 2.0), (16384, 1.0)], None, "none up to 16,384"),
        # Faster, slower and faster again: only what lies behind counts.
        ([(32768, 0.5), (4096, 0.9), (8192, 2.0)], 16384, "16,400"),
        ([(4096, 0.9), (8192, 1.5)], None, "none up to 8,192"),
    ],
)
def test_crossover(points: list[tuple[int, float]], length: float | None, text: str) -> None:
    found = [Point(*point) for point in points]
    assert crossover.crossover(found) == (None if length is None else pytest.approx(length))
    assert crossover.in_words(found) == text


def row(contender: str, seqlen: int, ms: float, **more: str) -> dict[str, Any]:
    """Return a row as a benchmark writes it: a forward of `ms`, a backward of twice that."""
    blank = dict.fromkeys(gpu_harness.COLUMNS, "")
    facts = {"date": "2026-01-01", "commit": "abc", "gpu": "some GPU", "dtype": "bfloat16"}
    shape = {"seqlen": seqlen, "nheads": 32, "nheads_kv": 8, "head_dim": 128}
    times = {"fwd_ms": ms, "bwd_ms": 2 * ms, "fwd_tflops": 100, "bwd_tflops": 90}
    return blank | facts | shape | {"contender": contender} | times | more


def test_the_table_for_the_readme(tmp_path: Path) -> None:
    dense = [row("lcdist full", n, 0.1) for n in (8192, 32768)]
    dense += [row("torch sdpa", n, n / 8192) for n in (8192, 32768)]
    dense += [row("FlexAttn", n, n / 4096) for n in (8192, 32768)]
    dense += [row("torch sdpa", 65536, 1.0, date="2025-01-01")]
    harness.write("full", dense[-1:] + dense[:-1], tmp_path)
    ours = [row("lcdist scca", 8192, 2.0), row("lcdist scca", 32768, 2.0, fwd_host_ms="0.3")]
    ours[1] |= {"bwd_host_ms": "0.5", "fwd_launches": "1", "bwd_launches": "2"}
    harness.write("scca", ours, tmp_path)
    # Another commit: no dense row of the same run.
    harness.write("lssar", [row("lcdist lssar", 4096, 1.0, commit="def")], tmp_path)
    above, _, head, marks, *lines = crossover.table(tmp_path).splitlines()
    assert above.startswith("some GPU, 2026-01-01, commit ") and "32:8 heads of 128" in above
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, marks)]
    assert len(cells[0]) == len(cells[1]) == len(crossover.HEADER)
    assert lines == [
        "| lcdist full | 0.1 / 0.2 | 100 / 90 | 0.03 | 8,192 or less | unmeasured | unmeasured |",
        "| torch sdpa | 4 / 8 | 100 / 90 | 1.00 | none up to 32,768 | unmeasured | unmeasured |",
        "| FlexAttn | 8 / 16 | 100 / 90 | 2.00 | none up to 32,768 | unmeasured | unmeasured |",
        "| lcdist scca | 2 / 4 | 100 / 90 | 0.50 | 16,400 | 0.3 / 0.5 | 1 / 2 |",
        "| lcdist lssar at 4,096 | 1 / 2 | 100 / 90 | unmeasured | unmeasured | unmeasured "
        "| unmeasured |",
    ]
    assert crossover.table(tmp_path / "empty") == ""


def test_committed_rows_have_the_columns_of_new_ones() -> None:
    for bench in gpu_check.BENCHES:
        file = harness.RESULTS / f"{bench.name}.csv"
        with file.open(newline="", encoding="utf-8") as stream:
            assert next(csv.reader(stream)) == gpu_harness.COLUMNS, file.name


# --- gpu_check ------------------------------------------------------------------------------------


def test_every_contender_is_compiled_once_by_some_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [gpu_harness.Size(n, 32, 8, d) for n, d in gpu_check.ORDER]
    monkeypatch.setattr(gpu_check, "sizes", lambda: sizes)
    items = gpu_check.compiled_items()
    asked = {(each.name, size.head_dim) for _, each, size in gpu_check.kernel_items()}
    assert len(items) == len(asked) == len({(each.name, size.head_dim) for _, each, size in items})
    done: list[Any] = []
    monkeypatch.setattr(gpu_check, "compile_one", done.append)
    for first in range(3):
        assert gpu_check.child("compile", tmp_path, first, 0.0, step=3) == 0
    assert len(done) == len(items) and all(item in done for item in items)


def test_a_contender_that_fails_does_not_end_the_compilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("on purpose")

    item = gpu_check.kernel_items()[0]
    monkeypatch.setattr(gpu_check, "gate", fails)
    gpu_check.compile_one(item)


def test_a_slow_plot_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(words: Any, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(words, timeout)

    monkeypatch.setattr(gpu_check.subprocess, "run", slow)
    assert gpu_check.plots(SimpleNamespace(folder=tmp_path, left=1.0)) == "no plots: time was up"

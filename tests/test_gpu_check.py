"""What the GPU check makes of tests, ranks, kernels, trainings that fail, hang or are stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.test_bench import TINY, gpu_check, gpu_ranks, gpu_tests, made_row, place

# --- tests in processes ---------------------------------------------------------------------------

TESTS = """
def test_one(): pass
def test_two(): assert 0
"""


def test_a_batch_of_tests_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS)
    batch, stopped = gpu_tests.Batch("some", (f"{file}::test_one", str(file))), threading.Event()
    row = gpu_tests.run_batch(batch, tmp_path, time.monotonic() + 60, stopped)
    assert list(row) == gpu_tests.COLUMNS
    assert (row["passed"], row["failed"], row["skipped"], row["note"]) == (1, 1, 0, "")
    assert "test_two" in (tmp_path / "some.log").read_text()
    late = gpu_tests.run_batch(batch, tmp_path, time.monotonic() - 1, stopped)
    assert late["note"] == "not begun: 2 tests" and late["passed"] == ""


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("why", ["time was up", "interrupted"])
def test_tests_that_take_too_long_may_write_their_report(why: str, deaf: bool) -> None:
    """deaf: the process does not end when it is asked to."""
    knocks: list[int] = []
    stopped = threading.Event()

    class Process:
        def wait(self, timeout: float | None = None) -> int:
            if len(knocks) > deaf:
                return -knocks[-1]
            if why == "interrupted":
                stopped.set()
            raise subprocess.TimeoutExpired("pytest", timeout or 0)

        def send_signal(self, number: int) -> None:
            knocks.append(number)

        def kill(self) -> None:
            knocks.append(signal.SIGKILL)

    end = time.monotonic() + (60 if why == "interrupted" else 0.05)
    assert gpu_tests.waited(Process(), end, stopped) == why
    assert knocks == [signal.SIGINT, signal.SIGKILL][: deaf + 1]
    assert gpu_tests.cut_off(why) and not gpu_tests.cut_off("the process ended with status 2")


@pytest.mark.parametrize(
    ("status", "note"),
    [(0, ""), (1, ""), *((n, f"the process ended with status {n}") for n in (2, -11))],
)
def test_how_tests_ended(status: int, note: str) -> None:
    class Process:
        def wait(self, timeout: float | None = None) -> int:
            return status

    assert gpu_tests.waited(Process(), time.monotonic() + 60, threading.Event()) == note


def test_tests_are_dealt_out_by_file_and_every_row_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = [f"tests/kernels/test_{name}_triton.py::test[{n}]" for name in "ab" for n in range(20)]
    marked.append("tests/kernels/test_b_triton.py::test_tensors_of_more_than_2_to_the_31_elements")
    others = ["tests/kernels/test_c.py::test", "tests/kernels/test_a_triton.py::test_quick"]
    monkeypatch.setattr(gpu_tests, "collect", lambda mark: marked if mark == "gpu" else others)
    batches = gpu_tests.batches()
    assert [batch.name for batch in batches] == [
        *("first-test_a_triton-0", "first-test_b_triton-0"),
        "big-test_b_triton",
        *("gpu-test_a_triton-0", "gpu-test_a_triton-1"),
        *("gpu-test_b_triton-0", "gpu-test_b_triton-1"),
        "rest-test_c-0",
    ]
    assert batches[0].tests == (marked[0], others[1])
    assert sorted(test for batch in batches for test in batch.tests) == sorted(marked + others)

    def run(batch: Any, *_: Any) -> dict[str, Any]:
        if batch.name == "big-test_b_triton":
            raise StopIteration("no suite")
        return gpu_tests.blank(batch)

    monkeypatch.setattr(gpu_tests, "run_batch", run)
    written: list[dict[str, Any]] = []
    gpu_tests.run_tests(tmp_path, time.monotonic() + 60, written.append)
    rows = {row["name"]: row for row in written}
    assert set(rows) == {batch.name for batch in batches} and len(written) == len(batches)
    assert rows["big-test_b_triton"]["note"] == "StopIteration: no suite"


def test_the_first_case_of_a_test_has_the_shape_that_trains() -> None:
    tests = [f"tests/a.py::test[{case}]" for case in ("dtype0-1280", "dtype0-128", "dtype1-128")]
    others = ["tests/a.py::other[64]", "tests/a.py::other[32]"]
    assert gpu_tests.first_cases([*tests, *others]) == [tests[1], others[0]]


@pytest.fixture(scope="module")
def on_a_gpu() -> Iterator[None]:
    """Collect what a GPU runs, once: a collection imports everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_tests, "HAS_GPU", True)
        patch.setattr(gpu_tests, "collect", cache(gpu_tests.collect))
        yield


@pytest.mark.exhaustive
@pytest.mark.usefixtures("on_a_gpu")
def test_every_kernels_first_case_is_among_the_first_tests() -> None:
    batches = gpu_tests.batches()
    first = [batch for batch in batches if batch.name.startswith("first-")]
    assert batches[: len(first)] == first
    # A process starts in some ten seconds and compiles a test's kernels in about as many.
    assert len(first) <= 2 * gpu_tests.MOST_PROCESSES
    assert max(len(batch.tests) for batch in first) <= gpu_tests.AT_ONCE["first"]
    tests = [test for batch in batches for test in batch.tests if gpu_tests.BIG not in test]
    begun = {test.partition("[")[0] for batch in first for test in batch.tests}
    assert begun >= {test.partition("[")[0] for test in tests if "_triton.py" in test}


@pytest.mark.exhaustive
@pytest.mark.usefixtures("on_a_gpu")
def test_what_only_compiles_is_left_out() -> None:
    names = [name for mark in gpu_tests.MARKS for name in gpu_tests.collect(mark)]
    assert len(names) > 900 and "test_equals_reference" in "".join(names)
    assert not [name for name in names if "compile" in name]


def test_an_interrupt_ends_what_runs_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"tests/kernels/test_{n}_triton.py::test" for n in range(40)]
    monkeypatch.setattr(gpu_tests, "collect", lambda mark: names if mark == "gpu" else [])
    begun, written = threading.Event(), []

    def run(batch: Any, folder: Path, end: float, stopped: threading.Event) -> dict[str, Any]:
        begun.set()
        assert stopped.wait(30)
        return gpu_tests.blank(batch) | {"note": "interrupted"}

    def interrupted(futures: Any) -> None:
        assert begun.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_tests, "run_batch", run)
    monkeypatch.setattr(gpu_tests, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_tests.run_tests(tmp_path, time.monotonic() + 60, written.append)
    assert 1 <= len(written) < 40 and {row["note"] for row in written} == {"interrupted"}


# --- what counts as a failure ---------------------------------------------------------------------


def said_by(step: Callable[[Any, float], str], folder: Path) -> str:
    check = gpu_check.Check(folder, 1)
    return step(check, check.end)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("3", "0", "")], "3 passed, 0 failed, 0 batches broken, 0 cut off"),
        ([("3", "1", "")], "failed: 3 passed, 1 failed, 0 batches broken, 0 cut off"),
        (
            [("3", "0", ""), ("", "", "the process ended with status -11")],
            "failed: 3 passed, 0 failed, 1 batches broken, 0 cut off",
        ),
        (
            [("3", "0", "time was up"), ("", "", "not begun: 9 tests")],
            "3 passed, 0 failed, 0 batches broken, 2 cut off",
        ),
    ],
)
def test_tests_that_break_are_failures(
    rows: list[tuple[str, str, str]], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_tests(folder: Path, end: float, put: Callable[[dict[str, Any]], None]) -> None:
        for passed, failed, note in rows:
            row = gpu_tests.blank(gpu_tests.Batch("some", ()))
            put(row | {"passed": passed, "failed": failed, "note": note})

    monkeypatch.setattr(gpu_check, "run_tests", run_tests)
    assert said_by(gpu_check.kernel_tests, tmp_path) == said


def rank_row(note: str = "", dtype: str = "bfloat16", growth: str = "1.1", **errors: str) -> Any:
    size = replace(TINY, dtype=dtype)
    row = gpu_ranks.blank(gpu_ranks.OPERATORS[0], size, 2, note)
    figures = {} if note else dict.fromkeys(gpu_ranks.PARTS, "0.003") | {"growth": growth}
    return row | figures | errors


FINE = dict.fromkeys(gpu_ranks.PARTS, "1e-6")


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (rank_row(), False),
        (rank_row(growth=""), False),
        (rank_row(dq="nan"), True),
        (rank_row(dv="0.06"), True),
        (rank_row(growth="2.1"), True),
        (rank_row(growth="nan"), True),
        (rank_row(dtype="float32", growth="3", **FINE), False),
        (rank_row(dtype="float32"), True),
        (rank_row("RuntimeError: no"), True),
        (rank_row("time was up"), False),
    ],
)
def test_wrong_results_on_ranks_are_failures(
    row: dict[str, Any], wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns(*_: Any) -> str:
        gpu_check.write("ranks", [row], tmp_path)
        return "complete"

    monkeypatch.setattr(gpu_check.Check, "turns", turns)
    said = said_by(gpu_check.virtual_ranks, tmp_path)
    assert said.startswith("failed: wrong results") == wrong and "1 rows" in said


@pytest.mark.parametrize(
    ("contender", "note", "said"),
    [
        ("lcdist full", "", "1 rows"),
        ("lcdist full", "OutOfResources: shared memory", "failed: 1 of ours; "),
        ("lcdist full", "time was up", "1 rows"),
        ("torch sdpa", "RuntimeError: no", "1 rows"),
        ("torch sdpa", "not timed: ArithmeticError: off", "failed: wrong results; "),
    ],
)
def test_kernels_of_ours_without_figures_are_failures(
    contender: str, note: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def turns(*_: Any) -> str:
        gpu_check.write("full", [made_row(contender, 4096, (1.0, 2.0), note=note)], tmp_path)
        return "complete"

    monkeypatch.setattr(gpu_check.Check, "turns", turns)
    monkeypatch.setattr(gpu_check, "plots", lambda check: "no plots")
    assert said_by(gpu_check.kernel_rates, tmp_path).startswith(said)


TRAINS = {"well": "", "ill": "raise SystemExit('no such kernel')", "late": "time.sleep(60)"}


def test_trainings_run_beside_one_another_and_their_ends_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen

    def popen(words: list[str], **more: Any) -> subprocess.Popen:
        code = f"import time\n{TRAINS[Path(words[4]).stem]}"
        return real([sys.executable, "-S", "-c", code], **more)

    monkeypatch.setattr(gpu_check, "HAS_GPU", True)
    monkeypatch.setattr(gpu_check.subprocess, "Popen", popen)
    monkeypatch.setattr(gpu_check, "LEAST_TRAINING", 3.0)
    (tmp_path / "runs" / "well").mkdir(parents=True)
    lines = '{"step": 1, "loss": 5.5}\n{"step": 2, "loss": 5.4}\n'
    (tmp_path / "runs" / "well" / "metrics.jsonl").write_text(lines)
    check = gpu_check.Check(tmp_path, 1)
    configs = [Path(f"{name}.toml") for name in TRAINS]
    rows = list(gpu_check.training_rows(check, configs, time.monotonic() - 100))
    assert [(row["config"], row["status"], row["last_loss"], row["said"]) for row in rows] == [
        ("well", 0, 5.4, ""),
        ("ill", 1, "", "no such kernel"),
        ("late", "time was up", "", ""),
    ]
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu_check, "training_rows", lambda *_: rows)
    assert gpu_check.trainings(check, check.end) == "failed: ill; 3 rows, complete"


def test_a_home_that_cannot_be_written_costs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "kept")
    place.find_cache(Path("/proc/nohome"))
    assert os.environ["TRITON_CACHE_DIR"] == "kept"
    monkeypatch.delenv("TRITON_CACHE_DIR")
    place.find_cache(tmp_path)
    assert "TRITON_CACHE_DIR" not in os.environ
    place.find_cache(Path("/proc/nohome"))
    assert Path(os.environ["TRITON_CACHE_DIR"]).parent.is_dir()

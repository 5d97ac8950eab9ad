"""Run the kernel tests on a GPU in several processes, the most informative first.

Most of their time is spent in the compiler, which uses one core a process. An invalid memory access
ends CUDA for the tests of one process only. Tests with more than 2^31 elements need much memory, so
they run one after another.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event, Lock
from typing import Any, NamedTuple
from xml.etree import ElementTree

from place import HAS_GPU, ROOT
from relay import TIME_WAS_UP

BIG = "2_to_the_31"
MARKS = ("gpu", "not gpu and not multi_gpu")
# Tests a process: few, so that processes end at about the same time.
AT_ONCE = {"first": 6, "gpu": 12, "other": 60}
# Of a test with many cases, the first to run: the head_dim of most models.
FIRST = "128"
MOST_PROCESSES = 14
# Seconds between checks for a stop request.
GLANCE = 0.5
NOT_BEGUN = "not begun"
COLUMNS = ["name", "passed", "failed", "skipped", "seconds", "note"]


class Batch(NamedTuple):
    """Tests that run in sequence in one process. alone: never beside another such batch."""

    name: str
    tests: tuple[str, ...]
    alone: bool = False


def collect(mark: str) -> list[str]:
    """Return the names of the kernel tests with a mark; without a GPU, those of one quick file."""
    where = "tests/kernels" if HAS_GPU else "tests/kernels/test_bands.py"
    words = ["-m", "pytest", where, "--collect-only", "-p", "no:cacheprovider", "-m"]
    # Compiling is most of the time: leave out full matrices, and tests that only compile.
    words += [f"({mark}) and not exhaustive"]
    words += ["-k", "not compile"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    # 5: no tests were collected.
    if done.returncode not in (0, 5):
        raise RuntimeError(" ".join((done.stdout + done.stderr).split()[-60:]))
    return [line for line in done.stdout.splitlines() if "::" in line]


def batches() -> list[Batch]:
    """Return all tests, the most informative first.

    A case of every test that runs kernels, then those marked gpu, then those that run kernels, then
    the rest. Large tensors come after the first cases.
    """
    marked, others = (collect(mark) for mark in MARKS)
    big = [Batch(f"big-{file_of(test).stem}", (test,), True) for test in marked if BIG in test]
    kernels = [test for test in others if "_triton.py" in test]
    rest = [test for test in others if "_triton.py" not in test]
    marked = [test for test in marked if BIG not in test]
    first = first_cases([*marked, *kernels])
    marked, kernels = ([test for test in tests if test not in first] for tests in (marked, kernels))
    parts = (("gpu", marked), ("kernels", kernels), ("rest", rest))
    later = [batch for name, tests in parts for batch in dealt(name, tests)]
    return [*dealt("first", first), *big, *later]


def first_cases(tests: list[str]) -> list[str]:
    """Return one case of every test: the first with the parameter FIRST, or else the first."""
    found: dict[str, str] = {}
    for test in tests:
        name = test.partition("[")[0]
        if name not in found or fits(test) > fits(found[name]):
            found[name] = test
    return list(found.values())


def fits(test: str) -> bool:
    """Return whether a test has the parameter FIRST."""
    return FIRST in test.partition("[")[2].rstrip("]").split("-")


def file_of(test: str) -> Path:
    """Return the file of a test."""
    return Path(test.partition("::")[0])


def dealt(name: str, tests: list[str]) -> Iterator[Batch]:
    """Split tests into batches, so that tests of one file share compiled kernels."""
    size = AT_ONCE.get(name, AT_ONCE["other"])
    for file in dict.fromkeys(map(file_of, tests)):
        own = [test for test in tests if file_of(test) == file]
        for n, start in enumerate(range(0, len(own), size)):
            yield Batch(f"{name}-{file.stem}-{n}", tuple(own[start : start + size]))


def run_tests(folder: Path, end: float, write: Callable[[dict[str, Any]], None]) -> None:
    """Write a row for each batch as it ends; an interrupt stops running batches, which report."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = batches()
    # In order, but what must be alone is one line, where its first batch stands.
    alone = [batch for batch in todo if batch.alone]
    lines = [alone if batch.alone else [batch] for batch in todo if batch not in alone[1:]]
    workers = min(MOST_PROCESSES, max(1, (os.cpu_count() or 2) - 2))
    stopped, one_writes = Event(), Lock()

    def through(line: list[Batch]) -> None:
        for batch in line:
            if stopped.is_set():
                return
            try:
                row = run_batch(batch, folder, end, stopped)
            except Exception as error:
                row = {**blank(batch), "note": f"{type(error).__name__}: {error}"}
            with one_writes:
                write(row)

    pool = ThreadPoolExecutor(workers)
    try:
        for future in wait([pool.submit(through, line) for line in lines]).done:
            future.result()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def blank(batch: Batch) -> dict[str, Any]:
    """Return a row without results."""
    return {**dict.fromkeys(COLUMNS, ""), "name": batch.name}


def run_batch(batch: Batch, folder: Path, end: float, stopped: Event) -> dict[str, Any]:
    """Run a batch and return its row; the output is in <folder>/<name>.log and .xml."""
    row = blank(batch)
    if time.monotonic() >= end:
        return row | {"note": f"{NOT_BEGUN}: {len(batch.tests)} tests"}
    report = folder / f"{batch.name}.xml"
    words = [sys.executable, "-m", "pytest", *batch.tests, "-p", "no:cacheprovider"]
    with (folder / f"{batch.name}.log").open("w") as log:
        process = subprocess.Popen(
            [*words, f"--junitxml={report}"], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        note = waited(process, end, stopped)
    return row | counted(report) | ({"note": note} if note else {})


def waited(process: subprocess.Popen, end: float, stopped: Event) -> str:
    """Interrupt tests that take too long, so that they still report; return a note."""
    status = None
    while status is None and time.monotonic() < end and not stopped.is_set():
        status = status_within(process, min(GLANCE, max(0.0, end - time.monotonic())))
    if status is not None:
        return f"the process ended with status {status}" if status not in (0, 1) else ""
    process.send_signal(signal.SIGINT)
    if status_within(process, 5.0) is None:
        process.kill()
        process.wait()
    return "interrupted" if stopped.is_set() else TIME_WAS_UP


def status_within(process: subprocess.Popen, seconds: float) -> int | None:
    """Return the exit status, or None if the process still runs after `seconds`."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def cut_off(note: str) -> bool:
    """Return whether a note only says that time was up."""
    return note in (TIME_WAS_UP, "interrupted") or note.startswith(NOT_BEGUN)


def counted(report: Path) -> dict[str, Any]:
    """Count passed, failed or broken, and skipped tests in a JUnit XML report."""
    if not report.exists():
        return {}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite")).attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    return {
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "seconds": round(float(suite["time"]), 1),
    }

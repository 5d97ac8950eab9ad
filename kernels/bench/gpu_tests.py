"""The kernels' tests on a GPU: dealt out over processes, the most telling first.

Most of their time is the compiler's, which has one core a process; and a kernel that ruins CUDA
ruins it for the tests of one process alone. Those with tensors of more than 2^31 elements need much
memory, so these come one after another.
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
# Tests a process: few, so that processes end at about one time.
AT_ONCE = {"gpu": 12, "other": 60}
MOST_PROCESSES = 14
# Seconds between looks at whether to stop.
GLANCE = 0.5
NOT_BEGUN = "not begun"
COLUMNS = ["name", "passed", "failed", "skipped", "seconds", "note"]


class Batch(NamedTuple):
    """Tests that run one after another in one process; alone: not beside others of its kind."""

    name: str
    tests: tuple[str, ...]
    alone: bool = False


def collect(mark: str) -> list[str]:
    """The names of the kernels' tests with a mark; without a GPU of one quick file."""
    where = "tests/kernels" if HAS_GPU else "tests/kernels/test_bands.py"
    words = ["-m", "pytest", where, "--collect-only", "-p", "no:cacheprovider", "-m", mark]
    # Those that only compile need no GPU, and much of the time.
    words += ["-k", "not compile"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    # 5: there are none.
    if done.returncode not in (0, 5):
        raise RuntimeError(" ".join((done.stdout + done.stderr).split()[-60:]))
    return [line for line in done.stdout.splitlines() if "::" in line]


def batches() -> list[Batch]:
    """All tests: marked gpu first, then those that run kernels, then the rest."""
    marked, others = (collect(mark) for mark in MARKS)
    big = [Batch(f"big-{file_of(test).stem}", (test,), True) for test in marked if BIG in test]
    marked = [test for test in marked if BIG not in test]
    kernels = [test for test in others if "_triton.py" in test]
    rest = [test for test in others if "_triton.py" not in test]
    parts = (("gpu", marked), ("kernels", kernels), ("rest", rest))
    return big + [batch for name, tests in parts for batch in dealt(name, tests)]


def file_of(test: str) -> Path:
    """Where it stands."""
    return Path(test.partition("::")[0])


def dealt(name: str, tests: list[str]) -> Iterator[Batch]:
    """Tests of one file stay together, as they share kernels."""
    size = AT_ONCE.get(name, AT_ONCE["other"])
    for file in dict.fromkeys(map(file_of, tests)):
        own = [test for test in tests if file_of(test) == file]
        for n, start in enumerate(range(0, len(own), size)):
            yield Batch(f"{name}-{file.stem}-{n}", tuple(own[start : start + size]))


def run_tests(folder: Path, end: float, write: Callable[[dict[str, Any]], None]) -> None:
    """A row a batch, written as they end; interrupted, those that run end with what they have."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = batches()
    lines = [[batch for batch in todo if batch.alone]]
    lines += [[batch] for batch in todo if not batch.alone]
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
    """A row without figures."""
    return {**dict.fromkeys(COLUMNS, ""), "name": batch.name}


def run_batch(batch: Batch, folder: Path, end: float, stopped: Event) -> dict[str, Any]:
    """Its row; what the tests said is in <folder>/<name>.log and .xml."""
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
    """Lets tests that take too long end with a report; what to note."""
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
    """None where it runs on."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None


def cut_off(note: str) -> bool:
    """Whether a note says no more than that there was no time."""
    return note in (TIME_WAS_UP, "interrupted") or note.startswith(NOT_BEGUN)


def counted(report: Path) -> dict[str, Any]:
    """How many tests passed, failed (or broke) and were skipped, by a report in JUnit's XML."""
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

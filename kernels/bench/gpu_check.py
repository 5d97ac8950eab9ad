"""Run everything that needs a GPU, in one command and without network; write results as they come.

    python kernels/bench/gpu_check.py [--out FOLDER] [--minutes 8.5]

1. tests.csv, tests/: every kernel test on the GPU, except those that only compile.
2. ranks.csv: every method on 1 to 64 virtual ranks in bf16, and its distance from float64.
3. compile: every kernel that step 4 measures, in as many processes as there are cores.
4. <method>.csv: what `bench_<method>.py` measures, the most informative rows first, and plots if
   matplotlib is installed.
5. training.csv: a few steps of each debug configuration, if megatron-core is installed.

Steps 1 to 4 need only torch, triton, numpy and pytest. A step that runs out of time keeps its rows,
and a process that dies does not end the next one. summary.json says what ran, what failed, what did
not run, and which goals were met. At the end come the goals and the table for the README.

Without a GPU the same code runs on the CPU, at sizes that take seconds, and the results say so.
"""

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_coca
import bench_full
import bench_landmark
import bench_lssar
import bench_scca
import bench_tensorized
import crossover
import gpu_ranks
from goals import goals
from goals import table as goals_table
from gpu_harness import (
    ALLOWED,
    FAILURES,
    Bench,
    Contender,
    Rows,
    Size,
    forget,
    gate,
    passes_of,
    said,
    sizes,
)
from gpu_tests import MOST_PROCESSES, cut_off, run_tests, status_within
from harness import write
from place import HAS_GPU, ROOT, device_name
from relay import TIME_WAS_UP, relay, take_turns
from torch import __version__ as torch_version
from triton import __version__ as triton_version

BENCHES = [
    module.BENCH
    for module in (
        *(bench_full, bench_coca, bench_scca),
        *(bench_tensorized, bench_landmark, bench_lssar),
    )
]
NEEDED_TO_TRAIN = ("megatron.core", "psutil", "sentencepiece", "tokenizers", "tensorboard", "rich")
NEEDED_TO_TRAIN += ("matplotlib",)
# Each step's share of the remaining time. The tests compile some 2,100 variants of kernels, about
# one second of a core each.
SHARES = {"tests": 0.4, "ranks": 0.22, "compile": 0.3, "kernels": 0.8, "training": 1.0}
# (seqlen, head_dim), the most informative first.
ORDER = [(32768, 128), (131072, 128), (32768, 64), (4096, 128), (16384, 128), (65536, 128)]
ORDER += [(8192, 128), (131072, 64), (4096, 64), (16384, 64), (8192, 64), (65536, 64)]
# FlexAttention compiles for a long time, so it comes after these sizes of the others.
LATER = (0, 0, 1)
# Possible notes on how a training ended.
OK = ("0", TIME_WAS_UP)
# Seconds that trainings get in any case.
LEAST_TRAINING = 10.0
# Largest accepted ratio of rounding errors (out and gradients) on many ranks to those on one rank.
MOST_GROWTH = 2.0


class Check:
    """The folder of results and the time that is left."""

    def __init__(self, folder: Path, minutes: float, at: str = "") -> None:
        self.folder, self.end = folder.resolve(), time.monotonic() + 60 * minutes
        self.commit = at
        self.summary: dict[str, Any] = {"device": device_name(), "steps": {}}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.note("versions", {"torch": torch_version, "triton": triton_version})

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self.end - time.monotonic())

    def note(self, key: str, value: Any) -> None:
        """Write one entry of the summary immediately."""
        self.summary[key] = value
        text = json.dumps(self.summary, indent=1)
        (self.folder / "summary.json").write_text(text + "\n", encoding="utf-8")

    def step(self, name: str, run: Callable[["Check", float], str]) -> None:
        """Run a step within its share of the time; record a failure and continue."""
        begun, seconds = time.monotonic(), self.left * SHARES[name]
        try:
            told = run(self, time.monotonic() + seconds)
        except FAILURES:
            told = f"failed: {traceback.format_exc()}"
        taken = round(time.monotonic() - begun, 1)
        print(f"{name} ({taken} s): {told}", flush=True)
        self.note("steps", self.summary["steps"] | {name: {"said": told, "seconds": taken}})

    def rows(self, name: str, rows: Iterable[dict[str, Any]], end: float) -> str:
        """Write rows to <name>.csv one by one until they are done or time is up."""
        count = 0
        for count, row in enumerate(rows, 1):
            write(name, [row], self.folder)
            if time.monotonic() > end:
                return f"{count} rows, then time was up"
        return f"{count} rows, complete"

    def turns(self, name: str, lost: Callable[[int, str], None], end: float) -> str:
        """Run the items of `name` in child processes of this program."""
        mark, log = self.folder / f"{name}.begun", self.folder / f"{name}.log"
        words = [sys.executable, __file__, "--out", str(self.folder), "--child", name]
        words += ["--commit", self.commit]
        complete = relay(words, mark, log, end, lost)
        mark.unlink(missing_ok=True)
        return "complete" if complete else "then time was up"


def kernel_tests(check: Check, end: float) -> str:
    """Run the kernel tests; on a CPU, one quick file of them."""
    run_tests(check.folder / "tests", end, lambda row: write("tests", [row], check.folder))
    rows = read_rows(check.folder / "tests.csv")
    counts = {key: sum(int(row[key] or 0) for row in rows) for key in ("passed", "failed")}
    left = sum(cut_off(row["note"]) for row in rows)
    broken = sum(bool(row["note"]) for row in rows) - left
    passed = f"{counts['passed']} passed, {counts['failed']} failed, {broken} batches broken"
    bad = "failed: " if counts["failed"] or broken else ""
    return f"{bad}{passed}, {left} cut off"


def read_rows(file: Path) -> list[dict[str, str]]:
    """Read a CSV of this run."""
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def virtual_ranks(check: Check, end: float) -> str:
    """Compare every method on virtual ranks with float64."""

    def lost(number: int, why: str) -> None:
        operator, (size, _) = gpu_ranks.OPERATORS[number], gpu_ranks.ranks_size()
        write("ranks", [gpu_ranks.blank(operator, size, "", why)], check.folder)

    told = check.turns("ranks", lost, end)
    rows = read_rows(check.folder / "ranks.csv")
    bad = "failed: wrong results; " if any(map(wrong_on_ranks, rows)) else ""
    return bad + counted(rows, told)


def wrong_on_ranks(row: dict[str, str]) -> bool:
    """Return whether a row reports a failure, a wrong result, or errors that grow with ranks."""
    if row["note"]:
        return row["note"] != TIME_WAS_UP
    most = ALLOWED[row["dtype"]]
    # Written so that NaN counts as wrong. In float32 both errors are rounding in the last bits.
    near = all(float(row[part]) <= most for part in gpu_ranks.PARTS)
    grown = row["dtype"] == "bfloat16" and row["growth"] and not float(row["growth"]) <= MOST_GROWTH
    return not near or bool(grown)


def counted(rows: Sequence[dict[str, str]], told: str) -> str:
    """Summarise a step from its rows; a row with a note is a failure."""
    failed = [row for row in rows if row["note"] and not row.get("fwd_ms") and not row.get("out")]
    return f"{len(rows)} rows, {len(failed)} of them without figures, {told}"


Item = tuple[Bench, Contender, Size]


def kernel_items() -> list[Item]:
    """Return all rows to make, in order; libraries for full attention run in its benchmark only."""
    wanted = sizes()
    place = {shape: number for number, shape in enumerate(ORDER)}
    items = [
        (
            place.get((size.seqlen, size.head_dim), 0) + LATER[contender.stage],
            bench,
            contender,
            size,
        )
        for bench in BENCHES
        for contender in bench.contenders
        for size in wanted
        if bench.name == "full" or contender.stage == 0 or contender.operator.method != "full"
    ]
    items.sort(key=lambda item: (item[0], item[2].stage))
    return [item[1:] for item in items]


def compile_kernels(check: Check, end: float) -> str:
    """Compile what `kernel_rates` measures, one child process a core; nothing is measured.

    A child that dies or is late costs nothing but time: its kernels are compiled when they are
    measured.
    """
    count = min(MOST_PROCESSES, os.cpu_count() or 1) if HAS_GPU else 1
    words = [sys.executable, __file__, "--out", str(check.folder), "--child", "compile"]
    begun = []
    for first in range(count):
        with (check.folder / f"compile-{first}.log").open("w", encoding="utf-8") as log:
            more = ["--first", str(first), "--step", str(count)]
            begun.append(subprocess.Popen([*words, *more], stdout=log, stderr=subprocess.STDOUT))
    try:
        ends = [status_within(child, max(0.0, end - time.monotonic())) for child in begun]
    finally:
        for child in begun:
            child.kill()
            child.wait()
    late = sum(status is None for status in ends)
    return f"{len(compiled_items())} kernels' shapes in {count} processes, {late} of them late"


def compiled_items() -> list[Item]:
    """Return one item of each contender and head_dim: length changes no kernel."""
    found = {(item[1].name, item[2].head_dim): item for item in reversed(kernel_items())}
    return list(reversed(found.values()))


def compile_one(item: Item) -> None:
    """Run a contender's gate and one pass at its length; what fails fails again when measured."""
    _, contender, size = item
    with suppress(*FAILURES):
        gate(contender, size.gate())
        passes_of(contender, size).each(lambda run: run())
    forget()


def kernel_rates(check: Check, end: float) -> str:
    """Measure time and memory of kernels and libraries, after the correctness gate."""
    items = kernel_items()

    def lost(number: int, why: str) -> None:
        bench, contender, size = items[number]
        write(bench.name, [Rows(check.commit).blank(contender, size, why)], check.folder)

    told = check.turns("kernels", lost, end)
    rows = [row for bench in BENCHES for row in read_rows(check.folder / f"{bench.name}.csv")]
    check.note("goals", [goal.facts() for goal in goals(check.folder, device_name())])
    notes = [(row["contender"].startswith("lcdist"), row["note"]) for row in rows]
    wrong = any(note.startswith("not timed: ArithmeticError") for _, note in notes)
    broken = sum(own and note not in ("", TIME_WAS_UP) for own, note in notes)
    bad = "failed: wrong results; " if wrong else f"failed: {broken} of ours; " if broken else ""
    return bad + counted(rows, f"{told}; {plots(check)}")


def plots(check: Check) -> str:
    """Plot the rows, if matplotlib is installed."""
    if find_spec("matplotlib") is None:
        return "no plots: matplotlib is not importable"
    words = [sys.executable, str(Path(__file__).parent / "plot.py"), str(check.folder)]
    seconds = min(60.0, max(5.0, check.left))
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "no plots: time was up"
    return "plots made" if done.returncode == 0 else f"no plots: {done.stderr.strip()[-200:]}"


def child(name: str, folder: Path, first: int, seconds: float, at: str = "", step: int = 1) -> int:
    """Run a child's part of a step: items from `first` on, until time is up.

    at: the commit. step: of "compile", every how many items.
    """
    mark = folder / f"{name}.begun"
    rows = Rows(at)

    def ranks(operator: Any) -> None:
        for row in gpu_ranks.rank_rows(operator, *gpu_ranks.ranks_size()):
            write("ranks", [row], folder)
            print(row, flush=True)

    def rates(item: Item) -> None:
        row = rows.row(*item[1:])
        write(item[0].name, [row], folder)
        print(said(row), flush=True)

    if name == "compile":
        for item in compiled_items()[first::step]:
            compile_one(item)
        return 0
    if name == "ranks":
        return take_turns(gpu_ranks.OPERATORS, ranks, first, mark, seconds)
    return take_turns(kernel_items(), rates, first, mark, seconds)


def trainings(check: Check, end: float) -> str:
    """Train a few steps of each debug configuration on the first GPU."""
    missing = [name for name in NEEDED_TO_TRAIN if find_spec(name.partition(".")[0]) is None]
    if missing:
        return f"not run: {', '.join(missing)} not importable"
    configs = sorted((ROOT / "configs" / "debug").glob("*.toml"))
    told = check.rows("training", training_rows(check, configs, end), math.inf)
    rows = read_rows(check.folder / "training.csv")
    broken = [row["config"] for row in rows if row["status"] not in OK]
    return f"failed: {', '.join(broken)}; {told}" if broken else told


def training_rows(check: Check, configs: list[Path], end: float) -> Iterable[dict[str, Any]]:
    """Train all configurations side by side; return a row with losses, or the last output."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    started = []
    for config in configs if HAS_GPU else configs[:1]:
        folder = check.folder / "runs" / config.stem
        folder.parent.mkdir(exist_ok=True)
        words = [sys.executable, "-m", "lcdist", "train", str(config), f"log.folder={folder}"]
        words += ["train.steps=20" if HAS_GPU else "train.steps=5", "log.peak_tflops=1.0"]
        with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log)
        started.append((folder, process))
    end = max(end, time.monotonic() + LEAST_TRAINING)
    try:
        for folder, process in started:
            status = status_within(process, max(0.1, end - time.monotonic()))
            yield training_row(folder, status)
    finally:
        for _, process in started:
            process.kill()
            process.wait()


def training_row(folder: Path, status: int | None) -> dict[str, Any]:
    """Return the row of a run; status: None if it ran out of time."""
    metrics, log = folder / "metrics.jsonl", folder.with_suffix(".log")
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    last = " ".join(log.read_text(encoding="utf-8").strip().splitlines()[-1:])[:300]
    return {
        "config": folder.name,
        "status": TIME_WAS_UP if status is None else status,
        "first_loss": losses[0] if losses else "",
        "last_loss": losses[-1] if losses else "",
        "said": "" if status == 0 else last,
    }


STEPS = {
    "tests": kernel_tests,
    "ranks": virtual_ranks,
    "compile": compile_kernels,
    "kernels": kernel_rates,
    "training": trainings,
}


def unused(folder: Path) -> Path:
    """Return the folder, or the next free name, so that earlier results are kept."""
    names = [folder, *(folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))]
    return next(name for name in names if not name.exists() or not any(name.iterdir()))


def main() -> int:
    """Run all steps; return 0 if none failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-check", help="folder of results")
    parser.add_argument("--minutes", type=float, default=8.5, help="for everything")
    parser.add_argument("--commit", default="", help="where this is no git repository")
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS))
    parser.add_argument("--child", choices=("ranks", "compile", "kernels"), help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return child(asked.child, asked.out, asked.first, asked.seconds, asked.commit, asked.step)
    check = Check(unused(asked.out), asked.minutes, asked.commit)
    print(f"{device_name()}; results in {check.folder}", flush=True)
    for name in asked.steps:
        check.step(name, STEPS[name])
    print(goals_table(check.folder, device_name()))
    print(f"\n{crossover.table(check.folder)}")
    return int(any(step["said"].startswith("failed") for step in check.summary["steps"].values()))


if __name__ == "__main__":
    # A background process of a shell would ignore the signal, and so would pytest in a child.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

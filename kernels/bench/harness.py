"""Shared parts of the CPU benchmarks: time and memory, ranks that wait for orders, result files.

Contenders take turns in one run, so a ratio never compares two moments of a noisy machine.
"""

import csv
import ctypes
import multiprocessing as mp
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from shutil import which
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], list[Tensor]]


def step(fn: Callable[..., Tensor], leaves: Sequence[Tensor], dout: Tensor) -> Step:
    """Run one forward and backward of fn(q, k, v); return [out, gradients of the leaves]."""

    def run() -> list[Tensor]:
        out = fn(*leaves[:3])
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return run


def measure(run: Step) -> tuple[float, float]:
    """Return the seconds of `run`, and the MiB it added to the process, outputs included."""
    # Freed memory that glibc keeps would hide the same amount of new memory.
    ctypes.CDLL(None).malloc_trim(0)
    # "5" resets the process's peak resident set size to its present value: proc(5).
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, _memory("VmHWM") - before


def _memory(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def _serve(answer: Callable[..., Any], rank: int, size: int, store: str, pipe: Connection) -> None:
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while (order := pipe.recv()) is not None:
        pipe.send(answer(rank, size, *order))
    if size > 1:
        dist.destroy_process_group()


class Ranks:
    """Processes that answer orders together and are idle between them.

    answer(rank, size, *order): a module-level function that sets its own number of threads.
    """

    def __init__(self, answer: Callable[..., Any], size: int, folder: str) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = f"{folder}/store{size}"
            process = context.Process(target=_serve, args=(answer, rank, size, store, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, *order: Any) -> list[Any]:
        """Send one order to all ranks and return their answers."""
        for pipe in self._pipes:
            pipe.send(order)
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
            process.join()


def machine() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Return the checked-out commit, marked if files other than results differ from it.

    Returns "unknown" outside a repository, or without git.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    dirty = _git("status", "--porcelain", "--", ":/", ":!/kernels/bench/results", ":!/gpu-check*")
    return f"{head}{'-dirty' if dirty else ''}" if head else "unknown"


def _git(*words: str) -> str:
    if which("git") is None:
        return ""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write(name: str, rows: list[dict[str, object]], folder: Path = RESULTS) -> None:
    """Add rows to <folder>/<name>.csv, with a header if the file is new.

    Raises ValueError if the file has other columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, columns = folder / f"{name}.csv", list(rows[0])
    new = not file.exists()
    with file.open("a+", newline="") as stream:
        stream.seek(0)
        found = next(csv.reader(stream), columns)
        if found != columns:
            raise ValueError(f"{file} has the columns {found}, new rows have {columns}: rename it")
        writer = csv.DictWriter(stream, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)

"""Full attention on this machine's CPU (Linux): the tiled operator and the ring beside torch's own.

    python kernels/bench/bench_full.py [--quick]

First it checks that all contenders agree, and refuses to time anything on red. Then one forward
and backward of causal attention, fp32: torch's scaled_dot_product_attention and the tiled operator
in this process on all cores, the ring over two gloo processes with half of the cores each.
Contenders take turns, so a ratio comes from one run. Rows are added to results/full.csv.
"""

import argparse
import csv
import ctypes
import multiprocessing as mp
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lcdist.attention import METHODS, Shape
from lcdist.layout import ContextLayout
from lcdist_kernels import full_attention, full_reference

SIZES = {4096: 5, 16384: 3, 32768: 1}  # tokens: repetitions
QUICK = {512: 5, 2048: 5}
NHEADS, HEAD_DIM = 8, 64
CP_SIZE = 2
RESULTS = Path(__file__).parent / "results" / "full.csv"
GATE = 1e-10

Step = Callable[[], list[Tensor]]


def step(fn: Callable[..., Tensor], qkv: list[Tensor], dout: Tensor) -> Step:
    """One forward and backward: [out, dq, dk, dv]."""

    def run() -> list[Tensor]:
        out = fn(*qkv)
        return [out.detach(), *torch.autograd.grad(out, qkv, dout)]

    return run


def inputs(seqlen: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same [q, k, v, dout] in every process."""
    made = torch.Generator().manual_seed(seqlen)
    return [torch.randn(1, seqlen, NHEADS, HEAD_DIM, generator=made, dtype=dtype) for _ in range(4)]


def memory(key: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def measure(run: Step) -> tuple[float, float]:
    """Seconds, and MiB above what the process held before (outputs and gradients included)."""
    # What glibc keeps of freed memory would hide as much new memory.
    ctypes.CDLL(None).malloc_trim(0)
    # "5" sets the process's high-water mark back to what it holds now: proc(5).
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    start = time.perf_counter()
    run()
    return time.perf_counter() - start, memory("VmHWM") - before


def ring_step(rank: int, seqlen: int, dtype: torch.dtype) -> tuple[Step, ContextLayout]:
    """The ring's forward and backward on this rank's shard."""
    method, group = METHODS["full"], dist.group.WORLD
    layout = ContextLayout("zigzag", seqlen, CP_SIZE)
    q, k, v, dout = (layout.shard(x, rank, 1) for x in inputs(seqlen, dtype))
    qkv = [x.requires_grad_() for x in (q, k, v)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return method.attention(
            q, k, v, options=method.options(), layout=layout, group=group, impl="torch"
        )

    return step(attend, qkv, dout), layout


def ring_rank(rank: int, store: str, threads: int, pipe: Connection) -> None:
    """A rank of the ring: answers ("gate" | "measure", seqlen) until it is told None."""
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=CP_SIZE)
    while (order := pipe.recv()) is not None:
        what, seqlen = order
        run, _ = ring_step(rank, seqlen, torch.float64 if what == "gate" else torch.float32)
        dist.barrier()
        pipe.send(run() if what == "gate" else measure(run))
    dist.destroy_process_group()


class RingRanks:
    """The two processes of the ring, idle between orders."""

    def __init__(self, store: str, threads: int) -> None:
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(CP_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=ring_rank, args=(rank, store, threads, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, what: str, seqlen: int) -> list:
        """Both ranks' answers."""
        for pipe in self._pipes:
            pipe.send((what, seqlen))
        return [pipe.recv() for pipe in self._pipes]

    def close(self) -> None:
        """Ends both processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()


def gate(ranks: RingRanks, seqlen: int = 640) -> str | None:
    """What disagrees with the dense reference in float64, or None."""
    q, k, v, dout = inputs(seqlen, torch.float64)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    truth = step(full_reference, qkv, dout)()
    layout = ContextLayout("zigzag", seqlen, CP_SIZE)
    ring = [layout.unshard(shards, 1) for shards in zip(*ranks.ask("gate", seqlen), strict=True)]
    for name, got in [
        ("torch", step(full_attention, qkv, dout)()),
        ("tiled", step(lambda q, k, v: full_attention(q, k, v, impl="torch"), qkv, dout)()),
        ("ring", ring),
    ]:
        for what, a, r in zip(("out", "dq", "dk", "dv"), got, truth, strict=True):
            error = ((a - r).norm() / r.norm()).item()
            if not error <= GATE:
                return f"{name}: {what} is off by {error:.3g} (allowed: {GATE:g})"
    return None


def time_all(ranks: RingRanks, seqlen: int, repetitions: int) -> dict[str, tuple[float, float]]:
    """Median seconds, and greatest extra MiB of a process, of each contender."""
    q, k, v, dout = inputs(seqlen)
    qkv = [x.requires_grad_() for x in (q, k, v)]
    runs = {
        "torch": step(full_attention, qkv, dout),
        "tiled": step(lambda q, k, v: full_attention(q, k, v, impl="torch"), qkv, dout),
    }
    taken: dict[str, list[tuple[float, float]]] = {"torch": [], "tiled": [], "ring": []}
    for _ in range(repetitions):
        for name, run in runs.items():
            taken[name].append(measure(run))
        both = ranks.ask("measure", seqlen)
        taken["ring"].append((max(t for t, _ in both), max(m for _, m in both)))
    return {
        name: (median(t for t, _ in all_of), max(m for _, m in all_of))
        for name, all_of in taken.items()
    }


def machine() -> str:
    """The processor's name and the number of its cores that torch uses."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def commit() -> str:
    """The checked-out commit, marked where files differ from it; "unknown" without git."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def rows_of(
    seqlen: int, repetitions: int, taken: dict[str, tuple[float, float]]
) -> list[dict[str, object]]:
    """The CSV rows of one size; flops are the forward's times 3.5 (arXiv:2307.08691, sec. 4.1)."""
    method = METHODS["full"]
    shape = Shape(
        batch=1, nheads=NHEADS, nheads_kv=NHEADS, head_dim=HEAD_DIM, itemsize=4, seqlen=seqlen
    )
    flops = 3.5 * method.flops(method.options(), shape)
    return [
        {
            "date": date.today().isoformat(),
            "commit": commit(),
            "torch": torch.__version__,
            "device": machine(),
            "dtype": "fp32",
            "nheads": NHEADS,
            "head_dim": HEAD_DIM,
            "seqlen": seqlen,
            "contender": name,
            "processes": CP_SIZE if name == "ring" else 1,
            "runs": repetitions,
            "ms": round(1e3 * seconds, 1),
            "gflop/s": round(flops / seconds / 1e9, 1),
            "over_torch": round(seconds / taken["torch"][0], 3),
            "extra_mib": round(extra, 1),
        }
        for name, (seconds, extra) in taken.items()
    ]


def write(rows: list[dict[str, object]]) -> None:
    """Adds rows to the CSV, with its header where the file is new."""
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def show(rows: list[dict[str, object]]) -> None:
    """The rows as a table: medians, and time as a multiple of torch's own attention."""
    shown = list(rows[0])[list(rows[0]).index("seqlen") :]
    table = Table(
        title=f"full attention, forward + backward, {NHEADS} heads of {HEAD_DIM}, fp32",
        caption=f"{machine()}; torch {torch.__version__}; commit {commit()}",
    )
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, a few seconds")
    sizes = QUICK if parser.parse_args().quick else SIZES
    torch.set_num_threads(max(CP_SIZE, len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as folder:
        ranks = RingRanks(f"{folder}/store", torch.get_num_threads() // CP_SIZE)
        try:
            if red := gate(ranks):
                print(f"not timed, because the results are wrong: {red}", file=sys.stderr)
                return 1
            rows = []
            for seqlen, repetitions in sizes.items():
                time_all(ranks, min(sizes), 1)  # warm: page tables, thread pools, connections
                measured = rows_of(seqlen, repetitions, time_all(ranks, seqlen, repetitions))
                write(measured)
                rows += measured
        finally:
            ranks.close()
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

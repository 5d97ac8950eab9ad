"""Time other tile sizes than the kernels' tables have (`tile_configs.py`), on a GPU; tuning.csv.

    python kernels/bench/tune.py [--out FOLDER] [--only full.BWD_DKV ...] [--head-dim 128]

Kernels do not tune themselves: other tiles sum in another order, so a choice by time would change
bits from run to run. This script reports faster tiles; a developer writes them into the table. CoCA
and SCCA's softmax rings use full attention's tiles.

Every candidate first passes the benchmark's gate (`gpu_harness`), many at a time, since the gate is
where the compiler's time goes. Then each is timed alone, after the table's own entry. Without a GPU
the same code runs in the interpreter, which has no tiles to choose.
"""

import argparse
import csv
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import torch
from gpu_harness import (
    FACTS,
    FAILURES,
    Operator,
    Rows,
    Size,
    forget,
    gate,
    ours,
    said_by,
)
from gpu_measure import FLUSHED, timed, wait
from harness import RESULTS, write
from place import DEVICE, HAS_GPU, device_name
from relay import relay, take_turns

from lcdist_kernels.full import tile_configs as full
from lcdist_kernels.landmark import tile_configs as landmark
from lcdist_kernels.lssar import tile_configs as lssar
from lcdist_kernels.tensorized import tile_configs as tensorized
from lcdist_kernels.triton_common import Launch

COLUMNS = [*FACTS, "table", "seqlen", "head_dim", *Launch._fields, "own"]
MEASURED = ["error", "ms", "spread", "note"]
SAID = ["table", "head_dim", *Launch._fields, *MEASURED]
SEQLEN, REPETITIONS = 16384, 7
# Scores of a tile for each thread: fewer waste the tensor cores, more do not fit into registers.
SCORES_A_THREAD = range(16, 65)
# The compiler's share of the whole time.
COMPILING = 0.6
MOST_PROCESSES = 14
# A smaller gain is noise.
WORTH_IT = 0.98


class Part(NamedTuple):
    """A table and the operator that measures it. same_n: block_n must stay as it is."""

    home: ModuleType
    table: str
    operator: Operator
    same_n: bool = False

    def __str__(self) -> str:
        return f"{self.home.__name__.split('.')[-2]}.{self.table}"

    @property
    def backward(self) -> bool:
        """Return whether the kernels belong to the backward pass."""
        return self.table.startswith("BWD")

    def entry(self, size: Size) -> tuple[dict[Any, Launch], tuple[int, int]]:
        """Return table and key of the launch for a size on this GPU."""
        itemsize = getattr(torch, size.dtype).itemsize
        table = getattr(self.home, self.table)
        key = min(k for k in table if k[0] >= size.head_dim and k[1] == itemsize)
        hopper = getattr(self.home, f"{self.table}_HOPPER", {})
        newer = HAS_GPU and torch.cuda.get_device_capability()[0] >= 9
        return (hopper if newer and key in hopper else table), key

    def candidates(self, size: Size) -> list[Launch]:
        """Return the candidates, the table's own entry first."""
        table, key = self.entry(size)
        own = table[key]
        made = [
            Launch(m, n, warps, stages)
            for m in (32, 64, 128)
            for n in ((own.block_n,) if self.same_n else (32, 64, 128))
            for warps in (4, 8)
            for stages in (2, 3, 4)
            if m * n // (32 * warps) in SCORES_A_THREAD
        ]
        return [own, *(launch for launch in made if launch != own)]

    @contextmanager
    def using(self, size: Size, launch: Launch) -> Iterator[None]:
        """Replace the table's entry by `launch` inside the context."""
        table, key = self.entry(size)
        kept, table[key] = table[key], launch
        try:
            yield
        finally:
            table[key] = kept


def parts() -> list[Part]:
    """Return all tables, the most important first."""
    tensor = Operator("tensorized", {"modes": (512,)}, trial={"modes": (4,)})
    blocks = Operator("landmark", trial={"block_size": 4})
    larger = Operator("landmark", {"block_size": 256}, trial={"block_size": 4})
    each = ("FWD", "BWD_DKV", "BWD_DQ")
    made = [Part(full, table, Operator()) for table in each]
    made += [Part(landmark, table, blocks, same_n=True) for table in each]
    made += [Part(lssar, table, Operator("lssar")) for table in (*each, "SUMS")]
    made += [Part(tensorized, table, tensor) for table in each]
    return made + [Part(landmark, f"{table}_LARGE", larger) for table in each]


Item = tuple[Part, Size, Launch]


def items(only: Sequence[str], head_dims: Sequence[int]) -> list[Item]:
    """Return the candidates to time, in order. only: tables or methods; empty: all."""
    known = [str(part) for part in parts()]
    if wrong := [word for word in only if not any(name.startswith(word) for name in known)]:
        raise SystemExit(f"--only {' '.join(wrong)}: the tables are {', '.join(known)}")
    wanted = [
        part for part in parts() if not only or any(str(part).startswith(word) for word in only)
    ]
    if not HAS_GPU:
        size = Size(8, 4, 2, 16, "float32")
        return [(part, size, launch) for part in wanted for launch in part.candidates(size)[:2]]
    sizes = [Size(SEQLEN, 32, 8, head_dim) for head_dim in head_dims]
    return [(part, s, launch) for s in sizes for part in wanted for launch in part.candidates(s)]


def blank(item: Item, facts: dict[str, Any]) -> dict[str, Any]:
    """Return a row without results."""
    part, size, launch = item
    table, key = part.entry(size)
    row = {**facts, "table": str(part), "seqlen": size.seqlen, "head_dim": size.head_dim}
    row |= {**launch._asdict(), "own": int(launch == table[key])}
    return row | dict.fromkeys(MEASURED, "")


def measured(item: Item) -> dict[str, Any]:
    """Return error and time of one candidate, or the reason for having none."""
    part, size, launch = item
    contender = ours(part.operator)
    try:
        with part.using(size, launch):
            error = gate(contender, size.gate())
            return {"error": f"{error:.2g}"} | clock(once_of(part, size))
    except FAILURES as failure:
        return {"note": said_by(failure)}
    finally:
        forget()


def once_of(part: Part, size: Size) -> Callable[[], Callable[[], float]]:
    """Return a function that runs the part's kernels once and returns their clock."""
    attend = ours(part.operator).build(part.operator.options_at(gate=False), size)
    *qkv, dout = size.inputs()
    leaves = [x.requires_grad_() for x in qkv]
    trash = torch.empty(FLUSHED, dtype=torch.int8, device=DEVICE) if HAS_GPU else None

    def once() -> Callable[[], float]:
        if not part.backward:
            return timed(lambda: attend(*leaves), trash)
        out = attend(*leaves)
        return timed(lambda: torch.autograd.grad(out, leaves, dout), trash)

    return once


def clock(once: Callable[[], Callable[[], float]]) -> dict[str, Any]:
    """Return median and spread."""
    once()
    clocks = [once() for _ in range(REPETITIONS)]
    wait()
    ms = [read() for read in clocks]
    middle = median(ms)
    return {"ms": round(middle, 4), "spread": round((max(ms) - min(ms)) / middle, 3)}


def passes(item: Item) -> None:
    """Run the gate and one pass, to compile; errors are reported when the candidate is timed."""
    part, size, launch = item
    with suppress(*FAILURES), part.using(size, launch):
        gate(ours(part.operator), size.gate())
        once_of(part, size)()
    forget()


def compiled(todo: Sequence[Item], child: list[str], folder: Path, end: float) -> None:
    """Compile every candidate in several processes by running the gate, which fills the cache."""
    count = min(MOST_PROCESSES, max(1, (os.cpu_count() or 2) - 2), len(todo))

    def line(number: int) -> None:
        words = [*child, "--child", "compile", "--part", str(number), str(count)]
        mark, log = folder / f"compile{number}.begun", folder / f"compile{number}.log"
        relay(words, mark, log, end, lambda *_: None)
        mark.unlink(missing_ok=True)

    pool = ThreadPoolExecutor(count)
    try:
        list(pool.map(line, range(count)))
    finally:
        pool.shutdown(cancel_futures=True)


def faster(file: Path, facts: dict[str, Any]) -> list[str]:
    """Return text about tiles worth adding to a table, from the rows with these facts."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["ms"] and facts.items() <= row.items()]
    lines = [] if rows else ["nothing was timed"]
    for table, head_dim in dict.fromkeys((row["table"], row["head_dim"]) for row in rows):
        tried = [row for row in rows if (row["table"], row["head_dim"]) == (table, head_dim)]
        own = [float(row["ms"]) for row in tried if row["own"] == "1"]
        best = min(tried, key=lambda row: float(row["ms"]))
        if own and float(best["ms"]) < WORTH_IT * own[-1]:
            launch = ", ".join(best[name] for name in Launch._fields)
            share = float(best["ms"]) / own[-1]
            lines.append(f"{table} d {head_dim}: Launch({launch}) takes {share:.2f} of the time")
    return lines or ["the tables' own are best"]


def main() -> int:
    """Compile, time and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(";")[0])
    folder = RESULTS if HAS_GPU else None
    parser.add_argument("--out", type=Path, default=folder, required=folder is None)
    parser.add_argument("--only", nargs="*", default=[], help="tables or methods")
    parser.add_argument("--head-dim", type=int, nargs="*", default=[128, 64])
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--commit", default="", help="where this is no git repository")
    parser.add_argument("--child", choices=("compile", "time"), help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    begun = time.monotonic()
    todo = items(asked.only, asked.head_dim)
    facts = Rows(asked.commit).facts
    notes = asked.out / "tuning"
    notes.mkdir(parents=True, exist_ok=True)

    def done(item: Item) -> None:
        row = blank(item, facts) | measured(item)
        write("tuning", [row], asked.out)
        print(*(f"{name}={row[name]}" for name in SAID), flush=True)

    if asked.child == "time":
        return take_turns(todo, done, asked.first, notes / "time.begun", asked.seconds)
    if asked.child == "compile":
        number, count = asked.part
        mark = notes / f"compile{number}.begun"
        return take_turns(todo[number::count], passes, asked.first, mark, asked.seconds)
    child = [sys.executable, __file__, "--out", str(asked.out), "--commit", facts["commit"]]
    child += ["--only", *asked.only, "--head-dim", *map(str, asked.head_dim)]
    print(f"{device_name()}: {len(todo)} candidates; rows in {asked.out}/tuning.csv", flush=True)
    compiled(todo, child, notes, begun + 60 * COMPILING * asked.minutes)
    end, words = begun + 60 * asked.minutes, [*child, "--child", "time"]

    def lost(number: int, why: str) -> None:
        row = blank(todo[number], facts)
        row["note"] = why
        write("tuning", [row], asked.out)

    whole = relay(words, notes / "time.begun", notes / "time.log", end, lost)
    (notes / "time.begun").unlink(missing_ok=True)
    lines = faster(asked.out / "tuning.csv", facts) if HAS_GPU else ["a trial: no choice"]
    print("\n".join(lines))
    print("all were timed" if whole else "time was up: go on with --only", flush=True)
    return 0


if __name__ == "__main__":
    # A background process of a shell would ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

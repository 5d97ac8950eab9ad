"""Benchmark every attention method on this machine's CPU (Linux) against torch's full attention.

    python kernels/bench/bench_methods.py [--quick] [--only WORD]

First every contender is compared in float64 with its dense reference, at an eighth of its sizes. If
one disagrees, nothing is timed. Then one forward and backward is timed, fp32, one core a process:
on one process, and context parallel on two. Contenders take turns, so the ratios of one length come
from one run. Rows are added to results/methods.csv.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from math import lcm
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from harness import Ranks, Step, commit, machine, measure, step, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lcdist.attention import METHODS, Shape
from lcdist.layout import ContextLayout, pieces_needed
from lcdist_kernels import Rotary, full_attention

SIZES = {4096: 3, 16384: 1, 32768: 1}  # tokens: repetitions
QUICK = {1024: 3, 2048: 3}
NHEADS, HEAD_DIM = 8, 64
GATE, GATE_SEQLEN, EIGHTH = 1e-10, 640, 8
BASELINE = "torch"


@dataclass(frozen=True)
class Contender:
    """A method with options. "torch" is torch's own full attention, on one process only."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = (f"{key}={value}" for key, value in self.options.items())
        return " ".join([self.name, *words])

    def small(self) -> "Contender":
        """Return the contender with options in tokens divided by eight."""
        sizes = {"chunk_size", "modes", "block_size", "select_tokens"}
        less = {k: _eighth(v) if k in sizes else v for k, v in self.options.items()}
        return Contender(self.name, less)


def _eighth(size: Any) -> Any:
    if isinstance(size, tuple):
        return tuple(_eighth(part) for part in size)
    return max(2, size // EIGHTH)


CONTENDERS = [
    Contender(BASELINE),
    Contender("full"),
    Contender("coca"),
    Contender("scca", {"pattern": "fixed", "chunk_size": 2048}),
    Contender("scca", {"pattern": "flow", "chunk_size": 2048}),
    Contender("scca", {"pattern": "sda", "dilation": 4}),
    Contender("scca", {"pattern": "longmixed", "chunk_size": 2048}),
    Contender("tensorized", {"modes": (512,)}),
    Contender("landmark", {"block_size": 64}),
    Contender("landmark", {"block_size": 64, "top_k": 16, "select_tokens": 1024}),
    Contender("lssar"),
]


def layout_of(contender: Contender, seqlen: int, cp_size: int) -> ContextLayout:
    """Return the method's preferred layout for the shortest legal length >= `seqlen` tokens."""
    method = METHODS[contender.name]
    options = method.options(**contender.options)
    legal = method.layouts_for(options)
    kind = "zigzag" if "zigzag" in legal else legal[0]
    own = method.multiple_of(options, cp_size, kind)
    unit = lcm(pieces_needed(kind, cp_size), own)
    return ContextLayout(kind, -(-seqlen // unit) * unit, cp_size, own)


def inputs(seqlen: int, dtype: torch.dtype) -> list[Tensor]:
    """Make [q, k, v, dout], the same in every process."""
    made = torch.Generator().manual_seed(seqlen)
    return [torch.randn(1, seqlen, NHEADS, HEAD_DIM, generator=made, dtype=dtype) for _ in range(4)]


def step_of(contender: Contender, seqlen: int, rank: int, size: int, dtype: torch.dtype) -> Step:
    """Run the contender's forward and backward on this rank's shard."""
    if contender.name == BASELINE:
        q, k, v, dout = inputs(seqlen, dtype)
        return step(full_attention, [x.requires_grad_() for x in (q, k, v)], dout)
    method = METHODS[contender.name]
    options, layout = method.options(**contender.options), layout_of(contender, seqlen, size)
    q, k, v, dout = (layout.shard(x, rank, 1) for x in inputs(layout.seqlen, dtype))
    params = {name: x.to(dtype) for name, x in method.initial(options, NHEADS).items()}
    leaves = [x.requires_grad_() for x in (q, k, v, *params.values())]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return method.attention(
            q,
            k,
            v,
            options=options,
            layout=layout,
            group=dist.group.WORLD if size > 1 else None,
            rotary=rotary(dtype),
            params=params or None,
            impl="torch",
        )

    return step(attend, leaves, dout)


def rotary(dtype: torch.dtype) -> Rotary:
    """Return the rotary embedding. torch's own attention runs without it."""
    return Rotary(10000.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=dtype) / HEAD_DIM))


def answer(rank: int, size: int, what: str, contender: Contender, seqlen: int) -> Any:
    """Answer an order on one rank: return tensors for the gate, or (seconds, MiB)."""
    torch.set_num_threads(1)
    dtype = torch.float64 if what == "gate" else torch.float32
    run = step_of(contender, seqlen, rank, size, dtype)
    if size > 1:
        dist.barrier()
    return run() if what == "gate" else measure(run)


def red(worlds: dict[int, Ranks], contender: Contender) -> str | None:
    """Return how the contender disagrees with its dense reference in float64, or None."""
    small = contender.small()
    method = METHODS[small.name]
    options = method.options(**small.options)
    for size, ranks in worlds.items():
        layout = layout_of(small, GATE_SEQLEN, size)
        q, k, v, dout = inputs(layout.seqlen, torch.float64)
        params = {name: x.double() for name, x in method.initial(options, NHEADS).items()}
        leaves = [x.requires_grad_() for x in (q, k, v, *params.values())]
        reference = step(
            lambda q, k, v, options=options, params=params: method.reference(
                q, k, v, options=options, rotary=rotary(torch.float64), params=params or None
            ),
            leaves,
            dout,
        )
        parts = list(zip(*ranks.ask("gate", small, GATE_SEQLEN), strict=True))
        got = [layout.unshard(part, 1) for part in parts[:4]]
        got += [torch.stack(part).sum(0) for part in parts[4:]]
        for what, a, r in zip(("out", "dq", "dk", "dv", *params), got, reference(), strict=True):
            error = ((a - r).norm() / r.norm()).item()
            if not error <= GATE:
                return f"{small} on {size}: {what} is off by {error:.3g} (allowed: {GATE:g})"
    return None


def time_all(
    worlds: dict[int, Ranks], contenders: list[Contender], seqlen: int, repetitions: int
) -> list[dict[str, object]]:
    """Return the CSV rows of one length: median seconds, and the largest extra MiB of a process."""
    entries = [(c, size) for c in contenders for size in worlds if size == 1 or c.name != BASELINE]
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(repetitions):
        for contender, size in entries:
            both = worlds[size].ask("measure", contender, seqlen)
            one = (max(t for t, _ in both), max(m for _, m in both))
            taken.setdefault((str(contender), size), []).append(one)
    base = median(t for t, _ in taken[BASELINE, 1])
    return [
        row_of(contender, size, seqlen, taken[str(contender), size], base)
        for contender, size in entries
    ]


def row_of(
    contender: Contender, size: int, seqlen: int, taken: list[tuple[float, float]], base: float
) -> dict[str, object]:
    """Return one CSV row; flops: forward over the touched area, times 3.5 (arXiv:2307.08691)."""
    method = METHODS["full" if contender.name == BASELINE else contender.name]
    shape = Shape(1, NHEADS, NHEADS, HEAD_DIM, itemsize=4, seqlen=seqlen)
    flops = 3.5 * method.flops(method.options(**contender.options), shape)
    seconds = median(t for t, _ in taken)
    return {
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "device": f"{machine()}, one core a process",
        "dtype": "fp32",
        "nheads": NHEADS,
        "head_dim": HEAD_DIM,
        "seqlen": seqlen,
        "contender": str(contender),
        "processes": size,
        "runs": len(taken),
        "ms": round(1e3 * seconds, 1),
        "gflop/s": round(flops / seconds / 1e9, 1),
        "over_torch": round(seconds / base, 3),
        "extra_mib": round(max(m for _, m in taken), 1),
    }


def show(rows: list[dict[str, object]]) -> None:
    """Print the rows as a table: medians, and time as a multiple of torch's full attention."""
    shown = list(rows[0])[list(rows[0]).index("seqlen") :]
    table = Table(
        title=f"attention, forward + backward, {NHEADS} heads of {HEAD_DIM}, fp32",
        caption=f"{rows[0]['device']}; torch {torch.__version__}; commit {rows[0]['commit']}",
    )
    for name in shown:
        table.add_column(name.replace("_", " "), justify="left" if name == "contender" else "right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in shown))
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, half a minute")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    arguments = parser.parse_args()
    chosen = [c for c in CONTENDERS if arguments.only in str(c) or c.name == BASELINE]
    with tempfile.TemporaryDirectory() as folder:
        worlds = {size: Ranks(answer, size, folder) for size in (1, 2)}
        try:
            for contender in chosen:
                wrong = None if contender.name == BASELINE else red(worlds, contender)
                if wrong:
                    print(f"not timed, because the results are wrong: {wrong}", file=sys.stderr)
                    return 1
            rows = []
            for seqlen, repetitions in (QUICK if arguments.quick else SIZES).items():
                time_all(worlds, chosen, 512, 1)  # warm: page tables, thread pools, connections
                measured = time_all(worlds, chosen, seqlen, repetitions)
                rows += measured
                if not arguments.quick:
                    write("methods", measured)
        finally:
            for ranks in worlds.values():
                ranks.close()
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Shared parts of `bench_<method>.py`: the correctness gate, the clock, the rows of a CSV.

A contender is first compared with its operator's dense reference in float64, out and gradients, at
a length where that fits. A wrong contender gets a row that says so, without times. Then forward and
backward are measured with random inputs (`gpu_measure`).

Columns:
    error: the gate's largest relative error, by norm.
    *_ms: medians of a call; *_spread: (largest - smallest) / median.
    *_host_ms: the host's time of a warm call; *_device_ms: what kernels and copies take on the
        device; *_launches: their number.
    *_tflops: the method's operations over the scores it touches. A backward counts 2.5 forwards,
        five products to two (arXiv:2307.08691), or as `Operator.backward_as` says.
    *_gbps: bytes of inputs and outputs over the time.
    peak_mib: peak memory of a forward and a backward beyond their inputs, out and gradients
        included.
    sm_mhz, watts: clock and power while the passes ran.
"""

import argparse
import gc
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu_measure import COSTS, PASSES, STATE, TIMES, Passes, measure
from harness import RESULTS, commit, write
from place import DEVICE, HAS_GPU, device_name, lost_cuda
from torch import Tensor
from triton import __version__ as triton_version
from triton.errors import TritonError

from lcdist.attention import METHODS, Shape
from lcdist.layout import ContextLayout
from lcdist_kernels import Rotary
from lcdist_kernels.full import FORCED
from lcdist_kernels.full.library import Library, find_library
from lcdist_kernels.full.library_choice import refusal

BACKWARD = 2.5
LENGTHS, HEAD_DIMS = (4096, 8192, 16384, 32768, 65536, 131072), (64, 128)
# Interpreted bf16 kernels are off by at most 1.6e-2 at 2,048 tokens; a wrong one by far more.
ALLOWED = {"bfloat16": 5e-2, "float32": 1e-4}
GATE_SEQLEN = 2048
# Tokens whose queries have a common part, if an operator's inputs are alike.
STRETCH = 128
# Errors of a kernel or library on a GPU it has not met before; the next contender still runs.
FAILURES = (
    *(RuntimeError, ValueError, ArithmeticError, TypeError, AttributeError, LookupError, NameError),
    *(ImportError, OSError, AssertionError, MemoryError, subprocess.SubprocessError),
    TritonError,
)
FACTS = ["date", "commit", "gpu", "torch", "triton"]
SHAPE = ["seqlen", "nheads", "nheads_kv", "head_dim", "dtype"]
MEASURED = ["error", "runs", *TIMES, "fwd_tflops", "bwd_tflops", "fwd_gbps", "bwd_gbps"]
MEASURED += ["peak_mib", *COSTS, *STATE]
COLUMNS = [*FACTS, *SHAPE, "contender", *MEASURED, "note"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """One problem size; dtype is torch's name."""

    seqlen: int
    nheads: int
    nheads_kv: int
    head_dim: int
    dtype: str = "bfloat16"

    def gate(self) -> "Size":
        """Return the gate's size: half the heads, and a length where dense float64 scores fit."""
        if not HAS_GPU:
            return self
        heads = self.nheads // 2, self.nheads_kv // 2
        return Size(min(GATE_SEQLEN, self.seqlen), *heads, self.head_dim, self.dtype)

    def inputs(self) -> list[Tensor]:
        """Make random q, k, v, dout."""
        made = torch.Generator(DEVICE).manual_seed(0)
        dtype = getattr(torch, self.dtype)
        heads = (self.nheads, self.nheads_kv, self.nheads_kv, self.nheads)
        shapes = [(1, self.seqlen, n, self.head_dim) for n in heads]
        return [torch.randn(s, generator=made, dtype=dtype, device=DEVICE) for s in shapes]

    def gigabytes(self) -> tuple[float, float]:
        """Return the gigabytes of inputs and outputs, forward and backward."""
        row = self.seqlen * self.head_dim * getattr(torch, self.dtype).itemsize / 1e9
        q, k = row * self.nheads, row * self.nheads_kv
        # Forward reads q, k, v and writes out; backward also reads dout, and writes dq, dk, dv.
        return 2 * q + 2 * k, 4 * q + 4 * k


def sizes() -> list[Size]:
    """Return the sizes to measure; without a GPU, one that takes seconds in the interpreter."""
    if not HAS_GPU:
        return [Size(8, 4, 2, 16, "float32")]
    return [Size(n, 32, 8, d) for n in LENGTHS for d in HEAD_DIMS]


@dataclass(frozen=True)
class Operator:
    """Name what is computed: a method, its options, and whether q and k are rotated by position.

    gate, trial: options that replace these at the gate's length, and without a GPU. backward_as:
    options whose forward has two fifths of the backward's operations, if these do not. alike: share
    of the variance of q that a stretch of tokens has in common.
    """

    method: str = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    trial: Mapping[str, Any] = field(default_factory=dict)
    rotated: bool = False
    backward_as: Mapping[str, Any] = field(default_factory=dict)
    alike: float = 0.0

    def __str__(self) -> str:
        words = [f"{key}={value}" for key, value in self.options.items()]
        words += ["rotated"] * self.rotated + [f"alike={self.alike}"] * bool(self.alike)
        return " ".join([self.method, *words])

    def inputs(self, size: Size) -> list[Tensor]:
        """Make random q, k, v, dout."""
        q, *others = size.inputs()
        return [alike(q, self.alike) if self.alike else q, *others]

    def options_at(self, gate: bool) -> Any:
        """Return the method's options."""
        words = {**self.options, **(self.gate if gate else {}), **({} if HAS_GPU else self.trial)}
        return METHODS[self.method].options(**words)

    def rotary(self, size: Size, dtype: torch.dtype) -> Rotary | None:
        """Return the rotary embedding, or None."""
        if not self.rotated:
            return None
        steps = torch.arange(0, size.head_dim, 2, dtype=dtype)
        return Rotary(10000.0 ** (-steps / size.head_dim))

    def reference(self, size: Size, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Compute [out, dq, dk, dv] in float64, dense, with the gate's options."""
        leaves = [x.double().requires_grad_() for x in inputs[:3]]
        rotary = self.rotary(size, torch.float64)
        options = self.options_at(gate=True)
        out = METHODS[self.method].reference(*leaves, options=options, rotary=rotary)
        return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].double())]

    def flops(self, size: Size) -> tuple[int, float]:
        """Return the operations of the forward and of the backward."""
        itemsize = getattr(torch, size.dtype).itemsize
        heads = size.nheads, size.nheads_kv
        shape = Shape(1, *heads, size.head_dim, itemsize, seqlen=size.seqlen)
        options = self.options_at(gate=False)
        forward, like = (
            METHODS[self.method].flops(o, shape)
            for o in (options, replace(options, **self.backward_as))
        )
        return forward, BACKWARD * like


def alike(q: Tensor, share: float) -> Tensor:
    """Return q with `share` of its variance in common among STRETCH tokens. q: `[b, s, h, d]`."""
    made = torch.Generator(q.device).manual_seed(1)
    shape = (q.shape[0], -(-q.shape[1] // STRETCH), *q.shape[2:])
    common = torch.randn(shape, generator=made, dtype=q.dtype, device=q.device)
    common = common.repeat_interleave(STRETCH, 1)[:, : q.shape[1]]
    return share**0.5 * common + (1 - share) ** 0.5 * q


@dataclass(frozen=True)
class Contender:
    """One implementation of an operator.

    build(options, size) returns attend(q, k, v); its own work, such as a block mask, is not timed.
    stage: 0 ours, 1 a library, 2 one that compiles for a long time. backward: whether it has a
    backward pass.
    """

    name: str
    operator: Operator
    build: Callable[[Any, Size], Attend]
    stage: int = 1
    backward: bool = True
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """The contenders for a method. name: the method's name, and the CSV's."""

    name: str
    contenders: Sequence[Contender]


def ours(operator: Operator, impl: str = "triton") -> Contender:
    """Return the contender that runs the method in one process, by our kernels or a library."""
    method = METHODS[operator.method]

    def build(options: Any, size: Size) -> Attend:
        layout = ContextLayout("contiguous", size.seqlen, 1)
        rotary = operator.rotary(size, torch.float32)
        more = {"options": options, "layout": layout, "rotary": rotary, "impl": impl}
        return lambda q, k, v: method.attention(q, k, v, group=None, **more)

    name, kernels = f"lcdist {operator}", impl == "triton"
    name = name if kernels else f"{name} impl={impl}"
    return Contender(name, operator, build, stage=0 if kernels else 1)


def by_libraries(operator: Operator) -> list[Contender]:
    """Return the contenders that run the method by each library that `impl` names and that is here.

    Its self-test, and the gate, come with the first row.
    """
    if not HAS_GPU:
        return []
    like = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    here = [name for name in FORCED if refusal(name, like) is None]
    return [ours(operator, name) for name in here if isinstance(find_library(name), Library)]


class Rows:
    """Make rows, and remember which contenders passed the gate, by head_dim.

    at: the commit, if this is not a repository.
    """

    def __init__(self, at: str = "") -> None:
        self._gates: dict[tuple[str, int], str | float] = {}
        self.facts = {
            "date": date.today().isoformat(),
            "commit": at or commit(),
            "gpu": device_name(),
            "torch": torch.__version__,
            "triton": triton_version,
        }

    def blank(self, contender: Contender, size: Size, note: str) -> dict[str, Any]:
        """Return a row without times, with the reason."""
        shape = {name: getattr(size, name) for name in SHAPE}
        row = {**self.facts, **shape, "contender": contender.name}
        return {**row, **dict.fromkeys(MEASURED, ""), "note": note}

    def row(self, contender: Contender, size: Size) -> dict[str, Any]:
        """Run the gate and measure; return the row, or one with the reason for having no times."""
        row = self.blank(contender, size, contender.note)
        error = self._gate(contender, size)
        if isinstance(error, str):
            row["note"] = f"not timed: {error}"
            return row
        try:
            return row | {"error": f"{error:.2g}"} | figures_of(contender, size)
        except FAILURES as failure:
            return row | {"note": said_by(failure)}
        finally:
            forget()

    def _gate(self, contender: Contender, size: Size) -> str | float:
        key = contender.name, size.head_dim
        if key not in self._gates:
            try:
                self._gates[key] = gate(contender, size.gate())
            except FAILURES as failure:
                self._gates[key] = said_by(failure)
            forget()
        return self._gates[key]


def said_by(failure: BaseException) -> str:
    """Return one line of an error."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:300]


def forget() -> None:
    """Free memory, so that a contender's out-of-memory error does not affect the next one."""
    if HAS_GPU:
        gc.collect()
        # After an invalid memory access every call raises until the process ends.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def gate(contender: Contender, size: Size) -> float:
    """Return the largest relative error of out and gradients.

    Raises ArithmeticError if it is too large.
    """
    inputs = contender.operator.inputs(size)
    attend = contender.build(contender.operator.options_at(gate=True), size)
    leaves = [x.detach().requires_grad_(contender.backward) for x in inputs[:3]]
    out = attend(*leaves)
    got = [out.detach()]
    if contender.backward:
        got += torch.autograd.grad(out, leaves, inputs[3])
    truth = contender.operator.reference(size, inputs)
    errors = {}
    for what, g, t in zip(("out", "dq", "dk", "dv"), got, truth, strict=False):
        errors[what] = ((g.double() - t).norm() / t.norm()).item()
        # Written so that NaN fails.
        if not errors[what] <= ALLOWED[size.dtype]:
            raise ArithmeticError(
                f"{what} is off by {errors[what]:.3g} from the dense reference in float64 at "
                f"{size.seqlen} tokens (allowed: {ALLOWED[size.dtype]:g})"
            )
    return max(errors.values())


def passes_of(contender: Contender, size: Size) -> Passes:
    """Return a contender's forward and backward pass on random inputs."""
    attend = contender.build(contender.operator.options_at(gate=False), size)
    *qkv, dout = contender.operator.inputs(size)
    leaves = [x.requires_grad_(contender.backward) for x in qkv]

    def backward(out: Tensor) -> None:
        torch.autograd.grad(out, leaves, dout)

    return Passes(lambda: attend(*leaves), backward if contender.backward else None)


def figures_of(contender: Contender, size: Size) -> dict[str, Any]:
    """Return the measured columns of one row."""
    figures = measure(passes_of(contender, size))
    flops = contender.operator.flops(size)
    for name, count, gigabytes in zip(PASSES, flops, size.gigabytes(), strict=True):
        if ms := figures.get(f"{name}_ms"):
            figures[f"{name}_ms"] = round(ms, 4)
            figures[f"{name}_tflops"] = round(count / ms / 1e9, 1 if HAS_GPU else 9)
            figures[f"{name}_gbps"] = round(1e3 * gigabytes / ms, 1 if HAS_GPU else 9)
    return figures


def said(row: Mapping[str, Any]) -> str:
    """Return a row as text."""
    where = f"{row['seqlen']:>6} d {row['head_dim']:<3} {row['contender']:<44}"
    if not row["fwd_ms"]:
        return f"{where} {row['note']}"
    names = [name for name in ("fwd", "bwd") if row[f"{name}_ms"]]
    both = [f"{name} {row[f'{name}_ms']} ms {row[f'{name}_tflops']} TFLOP/s" for name in names]
    return f"{where} {', '.join(both)}  {row['note']}"


def rows_of(
    bench: Bench, wanted: Sequence[Size], word: str = "", at: str = ""
) -> Iterator[dict[str, Any]]:
    """Yield rows, size by size, of all contenders with `word` in their name. at: see `Rows`."""
    rows = Rows(at)
    for size in wanted:
        for contender in bench.contenders:
            if word in contender.name:
                yield rows.row(contender, size)


def main(bench: Bench) -> int:
    """Run a script's command line; return 1 if a contender's results were wrong."""
    parser = argparse.ArgumentParser(description=f"{bench.name} attention on a GPU")
    folder = RESULTS if HAS_GPU else None
    parser.add_argument("--out", type=Path, default=folder, help="folder of the CSV")
    parser.add_argument("--seqlen", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--head-dim", type=int, nargs="*", default=HEAD_DIMS)
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--commit", default="", help="where this is no git repository")
    asked = parser.parse_args()
    wanted = sizes()
    if HAS_GPU:
        wanted = [s for s in wanted if s.seqlen in asked.seqlen and s.head_dim in asked.head_dim]
    print(f"{bench.name} attention: {device_name()}, torch {torch.__version__}", flush=True)
    wrong = False
    for row in rows_of(bench, wanted, asked.only, asked.commit):
        if asked.out is not None:
            write(bench.name, [row], asked.out)
        print(said(row), flush=True)
        wrong |= row["note"].startswith("not timed")
        if lost_cuda():
            print("CUDA is lost to this process: run the script again for the rest", flush=True)
            return 1
    return int(wrong)

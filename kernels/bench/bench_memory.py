"""Benchmark the tiled MLP against the whole one, on this machine's CPU (Linux): memory and time.

    python kernels/bench/bench_memory.py [--quick]

One layer's norm, MLP and residual, forward and backward. First the variants are compared in float64
at a sixteenth of the sizes, outputs and all gradients. If they disagree, nothing is measured. Then
they run in turn, fp32, on one core. Time is CPU time, so that a busy machine matters less. Memory
is the peak above inputs and weights, including gradients. Rows are added to results/memory.csv.
"""

import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from harness import Step, measure
from one_core import OneCore, on_one_core
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config import parse
from lcdist.config.schema import Config
from lcdist.distributed.mesh import build_mesh
from lcdist.model.build import build_model
from lcdist.model.memory.recompute import recomputed, trained
from lcdist.model.memory.tiled_mlp import MLPBlock, sequence_tiled
from lcdist.plan import make_plan

SIZES = [(32768, 1024, 2816)]  # tokens, hidden size, ffn hidden size
QUICK = [(2048, 256, 704)]
SHOWN = ["tokens", "contender", "cpu_ms", "over_whole", "extra_mib", "of_whole"]
GATE, SIXTEENTH = 1e-10, 16
Way = Callable[[Tensor], Tensor]


def config(tokens: int, hidden: int, ffn: int) -> Config:
    """Return the configuration of a one-layer model, tiled by default above 16,384 tokens."""
    return parse(
        {
            "model": {
                "vocab_size": 128,
                "num_layers": 1,
                "hidden_size": hidden,
                "nheads": 4,
                "ffn_hidden_size": ffn,
            },
            "data": {"source": "synthetic"},
            "train": {"seqlen": tokens, "steps": 1, "dtype": "fp32", "mlp": "tiled"},
            "log": {"folder": "unused"},
        }
    )


def second_half(tokens: int, hidden: int, ffn: int) -> tuple[MLPBlock, int]:
    """Return a layer's MLP block with random weights, and the number of tokens in a tile."""
    plan = make_plan(config(tokens, hidden, ffn), 1)
    [model] = build_model(plan, build_mesh(plan.config.parallel, 0).device)
    layer: Any = model.decoder.layers[0]
    chunk = plan.memory.mlp_chunk(tokens)
    assert chunk is not None
    return MLPBlock(layer.pre_mlp_layernorm, layer.mlp), chunk


def contenders(half: MLPBlock, tokens: int, chunk: int) -> dict[str, tuple[Way, int]]:
    """Return each variant by name, with the number of tokens it runs at once."""

    def whole(x: Tensor) -> Tensor:
        return x + half.mlp(half.norm(x))[0]

    def again(x: Tensor) -> Tensor:
        return recomputed(whole, x, trained(half.norm, half.mlp))

    found: dict[str, tuple[Way, int]] = {"whole": (whole, tokens), "whole, twice": (again, tokens)}
    for size in sorted({max(1, chunk), max(1, chunk // 4)}):
        found[f"tiles of {size}"] = (lambda x, size=size: sequence_tiled(half, x, size), size)
    return found


def once(way: Way, half: MLPBlock, x: Tensor, dout: Tensor) -> Step:
    """Run one forward and backward; return the output and the gradients of x and all weights."""
    leaves = [x.requires_grad_(), *trained(half.norm, half.mlp)]

    def run() -> list[Tensor]:
        out = way(x)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    return run


def gate(tokens: int, hidden: int, ffn: int) -> str | None:
    """Return how far a variant is from the whole block in float64, or None if close enough."""
    tokens, hidden, ffn = tokens // SIXTEENTH + 1, hidden // SIXTEENTH * 2, ffn // SIXTEENTH
    half, _ = second_half(tokens, hidden, ffn)
    for module in (half.norm, half.mlp):
        module.double()
    x, dout = (torch.randn(tokens, 1, hidden, dtype=torch.float64) for _ in range(2))
    ways = contenders(half, tokens, 100)
    expected = once(ways["whole"][0], half, x, dout)()
    for name, (way, _) in ways.items():
        for actual, truth in zip(once(way, half, x, dout)(), expected, strict=True):
            error = float((actual - truth).norm() / truth.norm())
            if not error < GATE:
                return f"{name} is off by {error:.2g}"
    return None


def rows(tokens: int, hidden: int, ffn: int, runs: int) -> list[dict[str, object]]:
    """Return a row for each variant: the fastest of `runs`, and the peak memory."""
    half, chunk = second_half(tokens, hidden, ffn)
    x, dout = (torch.randn(tokens, 1, hidden) for _ in range(2))
    ways = contenders(half, tokens, min(chunk, tokens // 8))
    measured = {name: SimpleNamespace(seconds=float("inf"), mib=0.0) for name in ways}
    for _ in range(runs):
        for name, (way, _) in ways.items():
            run = once(way, half, x, dout)
            begun = time.process_time()
            _, mib = measure(run)
            best = measured[name]
            best.seconds = min(best.seconds, time.process_time() - begun)
            best.mib = max(best.mib, mib)
    base = measured["whole"]
    return [
        {
            **on_one_core(),
            "dtype": "fp32",
            "tokens": tokens,
            "hidden_size": hidden,
            "ffn_hidden_size": ffn,
            "contender": name,
            "chunk": size,
            "runs": runs,
            "cpu_ms": round(measured[name].seconds * 1e3, 1),
            "over_whole": round(measured[name].seconds / base.seconds, 3),
            "extra_mib": round(measured[name].mib, 1),
            "of_whole": round(measured[name].mib / base.mib, 4),
        }
        for name, (_, size) in ways.items()
    ]


BENCH = OneCore("memory", __doc__, SIZES, QUICK, SHOWN, gate, rows)

if __name__ == "__main__":
    sys.exit(BENCH.main())

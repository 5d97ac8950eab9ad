"""Benchmark the output loss against others on whole logits, on this machine's CPU: memory and time.

    python kernels/bench/bench_loss.py [--quick]

First the variants are compared in float64 at a sixteenth of the sizes, losses and both gradients.
If they disagree, nothing is measured. Then each runs one forward and backward in turn, fp32, on one
core. Time is CPU time, so that a busy machine matters less. Memory is the peak above the inputs,
including gradients. Rows are added to results/loss.csv.
"""

import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import Step, measure
from one_core import OneCore, on_one_core
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config.schema import ParallelConfig
from lcdist.distributed.mesh import build_mesh
from lcdist.model.output_loss import VocabShard, output_losses
from lcdist.plan.activations import LOSS_CHUNK_TOKENS
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

SIZES = [(32768, 32768, 1024)]  # tokens, vocabulary, hidden size
QUICK = [(2048, 2048, 256)]
SHOWN = ["tokens", "vocabulary", "contender", "cpu_ms", "over_megatron", "extra_mib", "of_megatron"]
GATE, SIXTEENTH = 1e-10, 16
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the losses from whole logits with torch alone."""
    return F.cross_entropy(hidden @ weight.t(), targets, reduction="none")


def megatron_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute the losses from whole logits with Megatron's loss."""
    return vocab_parallel_cross_entropy(hidden @ weight.t(), targets)


def own_losses(chunk: int | None) -> Losses:
    """Return our losses with `chunk` tokens at a time; None: logits are kept."""

    def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        shard = VocabShard(0, len(weight))
        return output_losses(hidden[:, None], weight, targets[:, None], shard, chunk)[:, 0]

    return losses


def contenders(tokens: int, vocab: int) -> dict[str, tuple[Losses, int]]:
    """Return each variant by name, with the number of tokens that have logits at once."""
    planned = min(LOSS_CHUNK_TOKENS, tokens // 8)
    found: dict[str, tuple[Losses, int]] = {
        "torch, whole": (torch_losses, tokens),
        "megatron, whole": (megatron_losses, tokens),
        "kept": (own_losses(None), tokens),
    }
    for chunk in sorted({planned, planned // 4}):
        found[f"chunks of {chunk}"] = (own_losses(chunk), chunk)
    return found


def once(losses: Losses, inputs: list[Tensor]) -> Step:
    """Run one forward and backward; return losses and gradients of hidden states and weight."""
    hidden, weight, targets, dlosses = inputs
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def run() -> list[Tensor]:
        out = losses(hidden, weight, targets)
        return [out.detach(), *torch.autograd.grad(out, leaves, dlosses)]

    return run


def problem(tokens: int, vocab: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    """Make hidden states, weight, targets and a gradient of the losses."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dlosses = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((tokens, hidden), (vocab, hidden), (tokens,))
    )
    # Logits of order one, as in a trained model.
    weight.mul_(hidden**-0.5)
    return [x, weight, torch.randint(vocab, (tokens,), generator=generator), dlosses]


def gate(tokens: int, vocab: int, hidden: int) -> str | None:
    """Return how far a variant is from torch's losses in float64, or None if it is close enough."""
    tokens, vocab, hidden = tokens // SIXTEENTH + 1, vocab // SIXTEENTH + 3, hidden // SIXTEENTH
    build_mesh(ParallelConfig(), 0)  # whose groups Megatron's loss asks for
    inputs = problem(tokens, vocab, hidden, torch.float64)
    expected = once(torch_losses, inputs)()
    # Megatron computes its loss in fp32 for every input dtype.
    ways = {"megatron": (megatron_losses, 1e-6), "kept": (own_losses(None), GATE)}
    ways["chunked"] = own_losses(100), GATE
    for name, (losses, most) in ways.items():
        found = once(losses, inputs)()
        for actual, truth in zip(found, expected, strict=True):
            error = float((actual - truth).norm() / truth.norm())
            if not error < most:
                return f"{name} is off by {error:.2g}"
    return None


def rows(tokens: int, vocab: int, hidden: int, runs: int) -> list[dict[str, object]]:
    """Return a row for each variant: the fastest of `runs`, and the peak memory."""
    inputs = problem(tokens, vocab, hidden, torch.float32)
    ways = contenders(tokens, vocab)
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, (losses, _) in ways.items():
            run = once(losses, inputs)
            begun = time.process_time()
            _, mib = measure(run)
            measured[name].append((time.process_time() - begun, mib))
    base = min(seconds for seconds, _ in measured["megatron, whole"])
    held = max(mib for _, mib in measured["megatron, whole"])
    found = []
    for name, (_, chunk) in ways.items():
        seconds = min(seconds for seconds, _ in measured[name])
        mib = max(mib for _, mib in measured[name])
        found.append(
            {
                **on_one_core(),
                "dtype": "fp32",
                "tokens": tokens,
                "vocabulary": vocab,
                "hidden_size": hidden,
                "contender": name,
                "chunk": chunk,
                "runs": runs,
                "cpu_ms": round(seconds * 1e3, 1),
                "over_megatron": round(seconds / base, 3),
                "extra_mib": round(mib, 1),
                "of_megatron": round(mib / held, 4),
            }
        )
    return found


BENCH = OneCore("loss", __doc__, SIZES, QUICK, SHOWN, gate, rows)

if __name__ == "__main__":
    sys.exit(BENCH.main())

"""Benchmark CoCA's kernels and libraries that receive q' and k', on a GPU; write results/coca.csv.

    python kernels/bench/bench_coca.py [--out FOLDER] [--seqlen N ...] [--only WORD]

A score is q'.k' (arXiv:2309.08646), so any causal attention computes CoCA from q' and k'. One
compiled elementwise program makes them, inside the timed region. Rotation is a part of CoCA, so
full attention is timed with it.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from gpu_harness import Attend, Bench, Contender, Operator, Size, by_libraries, main, ours
from gpu_rivals import causal_rivals, compiled
from place import DEVICE
from torch import Tensor

from lcdist_kernels.coca.transform import Angles, rotary_angles

COCA = Operator("coca", rotated=True)


def factors(q: Tensor, t: Tensor, at: Angles) -> tuple[Tensor, Tensor]:
    """Compute q' and k' of the slack variant, rounded once: see `lcdist_kernels.coca.transform`."""
    (cos, sin), (a, b) = at, q.float().chunk(2, -1)
    first, second = t.float().chunk(2, -1)
    tau = (0.5 * (first + second)).relu()
    queries = torch.cat((a * (a * cos - b * sin), b * (b * cos + a * sin)), -1)
    keys = torch.cat((tau * (cos - sin), tau * (cos + sin)), -1)
    return queries.to(q.dtype), keys.to(t.dtype)


def over_factors(rival: Contender) -> Contender:
    """Return a contender that runs a library on q' and k'."""

    def build(options: Any, size: Size) -> Attend:
        attend, transform = rival.build(options, size), compiled(factors)
        like = torch.empty(0, dtype=torch.float32, device=DEVICE)
        rotary = COCA.rotary(size, torch.float32)
        at = rotary_angles(rotary, torch.arange(size.seqlen), like, size.head_dim)

        def run(q: Tensor, t: Tensor, v: Tensor) -> Tensor:
            queries, keys = transform(q, t, at)
            return attend(queries, keys, v)

        return run

    return replace(rival, name=f"{rival.name} of q'.k'", operator=COCA, build=build)


RIVALS = [over_factors(rival) for rival in causal_rivals(Operator())]
KERNELS = [ours(COCA), ours(Operator(rotated=True))]
BENCH = Bench("coca", [*KERNELS, *RIVALS, *by_libraries(COCA)])

if __name__ == "__main__":
    sys.exit(main(BENCH))

"""Benchmark LSSAR's kernels, on a GPU; write results/lssar.csv.

    python kernels/bench/bench_lssar.py [--out FOLDER] [--seqlen N ...] [--only WORD]

A weight is a power of a softplus minus the row's mean, without softmax, so no library computes it.
The rows are compared with libraries for full attention.
"""

import sys

from gpu_harness import Bench, Operator, main, ours
from gpu_rivals import causal_rivals

# Re-weighting adds a third product to the forward pass and none to the backward pass.
KINDS = [
    Operator("lssar", backward_as={"reweight": False}),
    Operator("lssar", {"reweight": False}),
]
FULL = "plain causal full attention: FlexAttention normalises by a softmax, which LSSAR does not"
BENCH = Bench("lssar", [*map(ours, KINDS), *causal_rivals(Operator(), FULL)])

if __name__ == "__main__":
    sys.exit(main(BENCH))

"""LSSAR's kernels beside full attention's libraries, on a GPU; rows to results/lssar.csv.

    python kernels/bench/bench_lssar.py [--out FOLDER] [--seqlen N ...] [--only WORD]

A weight is a power of a softplus less a row's mean, without softmax: no library computes it.
"""

import sys

from gpu_harness import Bench, Operator, main, ours
from gpu_rivals import causal_rivals

# Re-weighting has a third product forward, and no more of them backward.
KINDS = [
    Operator("lssar", backward_as={"reweight": False}),
    Operator("lssar", {"reweight": False}),
]
FULL = "plain causal full attention: FlexAttention normalises by a softmax, which LSSAR does not"
BENCH = Bench("lssar", [*map(ours, KINDS), *causal_rivals(Operator(), FULL)])

if __name__ == "__main__":
    sys.exit(main(BENCH))

"""Benchmark tensorized attention's kernels; write results/tensorized.csv.

    python kernels/bench/bench_tensorized.py [--out FOLDER] [--seqlen N ...] [--only WORD]

Values travel in several hops from mode to mode, so no library computes this attention. The rows are
compared with libraries for full attention.
"""

import sys

from gpu_harness import Bench, Operator, main, ours
from gpu_rivals import causal_rivals

GRIDS = [
    Operator("tensorized", {"modes": (512,)}, trial={"modes": (4,)}),
    Operator("tensorized", {"modes": (32, 32), "local_blocks": 1}, trial={"modes": (2, 2)}),
]
FULL = "plain causal full attention: FlexAttention cannot express hops over hidden values"
BENCH = Bench("tensorized", [*map(ours, GRIDS), *causal_rivals(Operator(), FULL)])

if __name__ == "__main__":
    sys.exit(main(BENCH))

"""Benchmark landmark attention's kernels; write results/landmark.csv.

    python kernels/bench/bench_landmark.py [--out FOLDER] [--seqlen N ...] [--only WORD]

The weight of a past block is a product of two softmaxes, so no library computes this attention. The
rows are compared with libraries for full attention.
"""

import sys

from gpu_harness import Bench, Operator, main, ours
from gpu_rivals import causal_rivals

CHOSEN = {"top_k": 64}
# With so much of their queries in common, neighbours share 80 % of 64 blocks at 32k tokens. Text is
# more alike; independent queries share an eighth at the end.
ALIKE = 0.94
KINDS = [
    Operator("landmark", trial={"block_size": 4}),
    Operator(
        "landmark",
        CHOSEN,
        gate={"top_k": 8, "select_tokens": 256},
        trial={"block_size": 4, "top_k": 1, "select_tokens": 2},
    ),
    *(
        Operator(
            "landmark",
            CHOSEN | {"select_tokens": 1},
            gate={"top_k": 8},
            trial={"block_size": 4, "top_k": 1},
            alike=alike,
        )
        for alike in (0.0, ALIKE)
    ),
]
FULL = "plain causal full attention: FlexAttention cannot express a grouped softmax"
BENCH = Bench("landmark", [*map(ours, KINDS), *causal_rivals(Operator(), FULL)])

if __name__ == "__main__":
    sys.exit(main(BENCH))

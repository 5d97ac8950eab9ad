"""Benchmark full attention's kernels and libraries for it, on a GPU; write results/full.csv.

python kernels/bench/bench_full.py [--out FOLDER] [--seqlen N ...] [--head-dim D ...] [--only WORD]
"""

import sys

from gpu_harness import Bench, Operator, by_libraries, main, ours
from gpu_rivals import causal_rivals

PLAIN = Operator()
BENCH = Bench("full", [ours(PLAIN), *causal_rivals(PLAIN), *by_libraries(PLAIN)])

if __name__ == "__main__":
    sys.exit(main(BENCH))

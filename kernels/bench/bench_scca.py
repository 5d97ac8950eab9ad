"""Benchmark SCCA's kernels and FlexAttention with the same masks, on a GPU; write results/scca.csv.

python kernels/bench/bench_scca.py [--out FOLDER] [--seqlen N ...] [--head-dim D ...] [--only WORD]

FlexAttention skips fully masked tiles and computes all others whole, so it gains nothing from a
dilated pattern. Its TFLOP/s count the touched scores, as ours do.
"""

import sys
from typing import Any

from gpu_harness import Attend, Bench, Contender, Operator, Size, main, ours
from gpu_rivals import causal_rivals, flex_contender, flexed, mask_of_rules

from lcdist.attention.scca.pattern import model_rules


def pattern(**options: Any) -> Operator:
    """Return the operator of SCCA; chunks are smaller for shorter sequences."""
    return Operator("scca", options, gate={"chunk_size": 256}, trial={"chunk_size": 2})


PATTERNS = [
    pattern(pattern="fixed"),
    pattern(pattern="flow"),
    pattern(pattern="sda", dilation=4),
    pattern(pattern="longmixed"),
]


def flex_of(operator: Operator) -> Contender:
    """Return FlexAttention with the operator's own mask."""

    def build(options: Any, size: Size) -> Attend:
        rules = model_rules(options, size.nheads, size.nheads_kv)
        return flexed(mask_of_rules(rules, size.seqlen))

    return flex_contender(f"FlexAttention {operator}", operator, build)


FULL = "plain causal full attention"
BENCH = Bench(
    "scca",
    [*map(ours, PATTERNS), *map(flex_of, PATTERNS), *causal_rivals(Operator(), FULL)],
)

if __name__ == "__main__":
    sys.exit(main(BENCH))

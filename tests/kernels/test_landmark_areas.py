"""Counted work of top_k with select_tokens = 1 against a gather for each token, and the goals.

Shape: 32:8 heads of 128, bf16, blocks of 64, 64 of them a token. Work is counted over sampled
chunks of 32 tokens, with queries that are independent or alike as in the benchmark. Times follow
from counts by the model that fits this package's kernels on one H100: a step takes its operations
at 5.0 TFLOP/s a processor, and 0.5 ns an instruction of a loop for each 4 warps.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.interpreter import interpret_without_gpu

interpret_without_gpu()
sys.path.append(str(Path(__file__).parents[2] / "kernels" / "bench"))
gpu_harness, bench_landmark = map(import_module, ("gpu_harness", "bench_landmark"))

GROUP, HEADS_KV, HEAD_DIM, SIZE, TOP_K = 4, 8, 128, 64, 64
CHUNK, SAMPLES = 32, 96
PROCESSORS, RATE = 132, 5.0e6  # operations a microsecond of a processor
# Bytes a microsecond that a processor gets from the second cache: 4.5 TB/s over all.
CACHE_RATE = 4.5e6 / PROCESSORS
# Rows of the smallest product of tensor cores that Triton makes of a left operand.
LEAST_ROWS = 16
# Dense landmark attention, forward and backward, ms at 32k: the goal of its kernels.
DENSE = 84


def step(rows: int, products: int, instructions: float) -> float:
    """Return microseconds of `rows` x 64 scores: products of 2 rows 64 d operations each."""
    operations = 2 * rows * SIZE * HEAD_DIM * products
    # Instructions are counted a score and thread: rows x 64 scores over 32 rows / 16 threads.
    return operations / RATE + 0.5e-3 * instructions * rows * SIZE / 128


# By rows of a tile, of the loops as compiled (`test_machine_code`).
FORWARD, DQ, DKV = step(128, 2, 12.7), step(128, 3, 16.3), step(128, 4, 21.9)
# A token's block: its keys and values pass from the second cache, in each of two kernels.
GATHERED = 2 * SIZE * HEAD_DIM * 2 / CACHE_RATE


class Chunk(NamedTuple):
    """Steps of 128 rows that a chunk's lists take, and blocks that its rows read.

    whole: one list of all rows. halves: two lists of 16 rows, at 5/8 of a step each.
    """

    whole: int
    halves: float
    read: int
    shared: float

    @property
    def union(self) -> float:
        """Return the steps of the way that kernels choose."""
        return min(self.whole, self.halves)


def chunks(seqlen: int, alike: float) -> list[Chunk]:
    """Return chunks at evenly spaced places of a sequence."""
    found = []
    for at in range(seqlen // SAMPLES // 2, seqlen, seqlen // SAMPLES):
        blocks = max(1, at // SIZE)
        q = torch.randn(1, CHUNK, GROUP, HEAD_DIM)
        if alike:
            q = gpu_harness.alike(q, alike)
        q, k = q[0], torch.randn(blocks, HEAD_DIM)
        probability = torch.einsum("rgd,nd->rgn", q, k).mul(HEAD_DIM**-0.5).softmax(-1).amax(1)
        chosen = probability.topk(min(TOP_K, blocks)).indices
        reads = torch.zeros(CHUNK, blocks, dtype=torch.bool).scatter_(1, chosen, True)
        half = sum(int(x.any(0).sum()) for x in reads.chunk(2))
        shared = (reads[1:] & reads[:-1]).sum() / reads[1:].sum()
        found.append(Chunk(int(reads.any(0).sum()), half * 5 / 8, int(reads.sum()), float(shared)))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def milliseconds(found: list[Chunk], seqlen: int) -> float:
    """Return the time of forward, dq, and dk and dv of past blocks."""
    walked = mean([x.union for x in found]) * (FORWARD + DQ)
    gathered = mean([x.read for x in found]) / CHUNK * DKV
    return (walked + gathered) * seqlen // CHUNK * HEADS_KV / PROCESSORS / 1e3


@pytest.mark.parametrize(
    ("seqlen", "alike", "most"),
    [
        (32768, 0.0, 1.1 * DENSE),
        (32768, bench_landmark.ALIKE, 40),
        # The goal is 0.4 of dense attention: not reached by this count.
        (131072, 0.0, 0.45 * 16 * DENSE),
    ],
)
def test_a_union_is_less_work_than_a_gather_for_each_token(
    seqlen: int, alike: float, most: float
) -> None:
    found = chunks(seqlen, alike)
    if alike:
        assert 0.78 < mean([x.shared for x in found]) < 0.84
    for each in found:
        assert each.union * FORWARD < each.read * GATHERED
        assert each.union * DQ < each.read * GATHERED
    assert milliseconds(found, seqlen) < most


def test_no_choice_makes_a_gather_for_each_token_pay() -> None:
    # 16 rows that share nothing, at any length: a step of half a tile for each block, for 16 rows.
    apart = TOP_K * LEAST_ROWS * 5 / 8 * FORWARD / LEAST_ROWS
    assert apart < TOP_K * GATHERED
    # By the area of products alone it would: 16 rows of 4 a token's block, against 64 for each.
    assert LEAST_ROWS * TOP_K < 64 * TOP_K * LEAST_ROWS / LEAST_ROWS

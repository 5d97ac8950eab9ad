"""Choice of past blocks by a selection unit: its top_k by their landmarks' gate probability.

With p_ib = softmax over the past landmarks of query i (arXiv:2305.16300, retrieval; no local keys),
a unit of tokens chooses, for each key head, the blocks of greatest

    max over its tokens i and the group's query heads of p_ib,

among those that are past for at least one of its tokens; all of them if there are at most top_k. Of
equal blocks the first wins.

The choice must not depend on the summation order of a matrix product, which follows the shapes of
tiles and shards. So p is computed in float64 from any dtype of q and k, and 1 - ln p is compared
rounded to float32. Another order moves it by 1e-13 or less while a rounding step is 1e-7, so
landmarks that are nearly equal compare as equal. `top_k_launch` has the same choice by a kernel, of
costs in float32.
"""

import torch
from torch import Tensor

from lcdist_kernels.landmark.blocks import QueryRows, Run, runs_of
from lcdist_kernels.partial import visible

# Scores in float64 at once: 16 MiB.
SCORES_AT_ONCE = 1 << 21


@torch.no_grad()
def choose_blocks(
    q: Tensor,
    k_landmarks: Tensor,
    rows: QueryRows,
    lengths: Tensor,
    top_k: int,
    softmax_scale: float,
) -> Tensor:
    """Return the blocks that each unit reads: int32 `[b, h_kv, units, min(top_k, n)]`.

    The numbers increase; -1 fills the end where there are fewer blocks than top_k.

    Args:
        q: `[b, s, h, d]`, rotated.
        k_landmarks: `[b, n, h_kv, d]`, rotated: of all blocks of the grid.
        lengths: rows of each unit, all of one document, int64 `[units]`.
    """
    nheads_kv, num_blocks = k_landmarks.shape[2], k_landmarks.shape[1]
    width = min(top_k, num_blocks)
    chosen = torch.empty(
        (q.shape[0], nheads_kv, len(lengths), width), dtype=torch.int32, device=q.device
    )
    k_start = torch.arange(num_blocks) * rows.block_size
    by_head = q.unflatten(2, (nheads_kv, -1))
    keys = k_landmarks.permute(0, 2, 3, 1).double() * softmax_scale  # [b, h_kv, d, n]
    at_once = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[2] * num_blocks))
    for run in runs_of(lengths):
        units = max(1, at_once // run.length)
        for i in range(0, run.count, units):
            part = Run(
                run.start + i * run.length, run.first + i, min(units, run.count - i), run.length
            )
            cost = _unit_costs(by_head, keys, rows, k_start, part, at_once)
            chosen[:, :, part.first : part.first + part.count] = select_least(cost, width)
    return chosen


def _unit_costs(
    q: Tensor, keys: Tensor, rows: QueryRows, k_start: Tensor, run: Run, at_once: int
) -> Tensor:
    """Return the least 1 - ln p over each unit: fp32 `[b, h_kv, units, n]`.

    It is infinite where a block is past for none of the unit's tokens.
    """
    rows_of_run = run.count * run.length
    last, first = rows.part(run.start, run.start + rows_of_run).past
    a, b = int(first.min()) // rows.block_size, (int(last.max()) + 1) // rows.block_size
    least = keys.new_full(
        (*keys.shape[:2], run.count, len(k_start)), torch.inf, dtype=torch.float32
    )
    if a >= b:
        return least
    step = run.count * min(run.length, at_once)
    for start in range(run.start, run.start + rows_of_run, step):
        stop = min(start + step, run.start + rows_of_run)
        past = visible(*rows.part(start, stop).past, k_start[a:b]).to(q.device)
        by_head = q[:, start:stop].permute(0, 2, 3, 1, 4).double()
        cost = _costs(by_head @ keys[:, :, None, :, a:b], past).amin(2)
        cost = cost.unflatten(2, (run.count, -1)).amin(3)
        least[..., a:b] = torch.minimum(least[..., a:b], cost)
    return least


def _costs(scores: Tensor, past: Tensor) -> Tensor:
    """Return 1 - ln p of scores, infinite where not past; overwrites scores."""
    scores = scores.masked_fill_(~past, -torch.inf)
    normalizer = scores.logsumexp(-1, keepdim=True)
    return (1 - (scores - normalizer)).masked_fill_(~past, torch.inf).float()


def select_least(cost: Tensor, width: int) -> Tensor:
    """Return the blocks of least cost, increasing, then -1: int32 `[b, h_kv, units, width]`."""
    num_blocks = cost.shape[-1]
    # Positive floats sort like their bits; the block number in the low bits breaks ties.
    bits = cost.contiguous().view(torch.int32).long() << 32
    keys = bits | torch.arange(num_blocks, device=cost.device)
    best = keys.topk(width, dim=-1, largest=False).values
    numbers = best & 0xFFFFFFFF
    none = cost.gather(-1, numbers) == torch.inf
    numbers = numbers.masked_fill(none, num_blocks).sort(-1).values
    return numbers.masked_fill(numbers == num_blocks, -1).int()

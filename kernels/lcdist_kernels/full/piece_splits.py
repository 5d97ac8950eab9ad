"""Split the longest programs of dk and dv, where few key heads leave processors without work.

A program walks all rows that see a tile of keys. With one key head and 8,192 keys there are 64 such
programs, fewer than processors, and under a causal mask the longest walks twice the mean. So its
rows are dealt to several programs, which write parts in fp32, and one kernel adds the parts of each
tile in order: the result depends on the plan alone.
"""

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.full.pieces import KeyProgram, Run, TileSum

# Of an H100. A constant, as results must not depend on the GPU.
PROCESSORS = 132
# Start and end of a program, in steps.
OVERHEAD = 3
# Below, a launch for the sums costs more than it saves.
FEWEST_KEYS = 8192
# Longest time over that of evenly spread work that is left alone, and the gain that pays for sums.
UNEVEN, WORTHWHILE = 1.15, 0.85
MOST_PARTS = 8


class Split(NamedTuple):
    """Tables of dk and dv with parts.

    programs, runs: as in `WorkTables`. costs: steps by program. sums: a `TileSum` for each tile
    with parts.
    """

    programs: Tensor
    runs: Tensor
    costs: Tensor
    sums: Tensor


def makespan(costs: list[int]) -> int:
    """Return the steps until all programs have ended, each with its overhead, longest first."""
    ends = [0] * PROCESSORS
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(ends, ends[0] + cost + OVERHEAD)
    return max(ends)


def most_steps(costs: list[int]) -> int | None:
    """Return the most steps of a part, or None if nothing should be split."""
    # With many programs for each processor, work is even.
    if not costs or len(costs) > 8 * PROCESSORS:
        return None
    whole = makespan(costs)
    if whole * PROCESSORS <= UNEVEN * sum(cost + OVERHEAD for cost in costs):
        return None
    found = {}
    for parts in range(2, MOST_PARTS + 1):
        most = -(-max(costs) // parts)
        found[most] = makespan([part for cost in costs for part in _parts(cost, most)])
    best = min(found, key=lambda most: found[most])
    return best if found[best] <= WORTHWHILE * whole else None


def _parts(cost: int, most: int) -> list[int]:
    """Return the steps of the parts of a program, as even as can be."""
    count = max(1, -(-cost // most))
    return [cost * (i + 1) // count - cost * i // count for i in range(count)]


def split_programs(programs: Tensor, runs: Tensor, costs: Tensor, num_keys: int) -> Split:
    """Return the tables with the longest programs split, in any order of programs.

    Args:
        programs: `KeyProgram` rows without parts. runs: `Run` rows. costs: steps by program.
        num_keys: tokens of the tensor of keys.
    """
    sums = torch.empty((0, len(TileSum._fields)), dtype=torch.int64)
    most = most_steps(costs.tolist()) if num_keys >= FEWEST_KEYS else None
    if most is None:
        return Split(programs, runs, costs, sums)
    made, new_runs, new_costs, new_sums, part = [], runs.tolist(), [], [], 0
    table = runs.tolist()
    for row, cost in zip(programs.tolist(), costs.tolist(), strict=True):
        program = KeyProgram(*row)
        pieces = _parts(cost, most)
        new_costs += pieces
        if len(pieces) == 1:
            made.append(program)
            continue
        walk = _cut([Run(*table[i]) for i in range(program.runs_begin, program.runs_end)], pieces)
        new_sums.append((row[0], *row[2:6], part, part + len(pieces)))
        for own in walk:
            begin = len(new_runs)
            new_runs += own
            made.append(program._replace(runs_begin=begin, runs_end=len(new_runs), part=part))
            part += 1
    return Split(*map(torch.tensor, (made, new_runs, new_costs, new_sums)))


def _cut(runs: list[Run], pieces: list[int]) -> list[list[Run]]:
    """Return the runs of each part: the same steps in the same order, `pieces` of them each."""
    made: list[list[Run]] = [[] for _ in pieces]
    number, left = 0, pieces[0]
    for run in runs:
        for head in range(run.head, run.head + run.heads):
            tile = run.first
            while tile < run.stop:
                if not left:
                    number += 1
                    left = pieces[number]
                stop = min(run.stop, tile + left)
                inner = (min(max(x, tile), stop) for x in (run.whole_first, run.whole_stop))
                made[number].append(Run._make((head, 1, *run[2:7], tile, *inner, stop)))
                left -= stop - tile
                tile = stop
    return made

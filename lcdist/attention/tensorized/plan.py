"""Exchange plan of tensorized attention under context parallelism, and its bytes.

Shards are whole blocks of the product of modes. The coarsest mode is computed in units: one offset
inside a block and one key head each. Ranks have equally many units or one more, also if there are
more ranks than offsets. If branch 1 reads more than one block, it needs a halo: the blocks before
the shard, from as many earlier ranks as they span.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.attention.context import CPU, LayoutKey, token_table
from lcdist.attention.shape import HeadSlice, Shape, Traffic
from lcdist.attention.shared.plan_cache import cached_plan
from lcdist.config.schema import TensorizedOptions
from lcdist.exchange import Interval
from lcdist.layout import ContextLayout
from lcdist_kernels import tensorized as ops
from lcdist_kernels.common import document_starts
from lcdist_kernels.tensorized import Branch, ModeGrid


def make_grid(options: TensorizedOptions, heads: HeadSlice, held: tuple[int, int]) -> ModeGrid:
    """Return the grid of `options` for a tensor of `held` (query, key) heads of a model.

    Raise ValueError if hops average over heads that the tensor does not hold.
    """
    group = heads.nheads // heads.nheads_kv
    hop_heads = options.hop_heads
    if hop_heads == "auto":
        hop_heads = "q" if group <= 2 else "kv"
    grid = ModeGrid(
        options.modes, options.local_blocks if options.modes else 1, options.pe, hop_heads
    )
    if grid.modes and hop_heads == "kv" and held[0] != group * held[1]:
        raise ValueError(
            f"hop_heads = {options.hop_heads!r}: hops take the mean over a group of {group} query "
            f"heads, of which this rank holds {held[0]}; use hop_heads = 'q', or a tp_size that "
            f"divides nheads_kv = {heads.nheads_kv}"
        )
    return grid


def count_units(grid: ModeGrid, nheads_kv: int, cp_size: int) -> list[int]:
    """Return the number of units of the coarsest mode that each rank computes."""
    units = grid.block * nheads_kv
    borders = [units * rank // cp_size for rank in range(cp_size + 1)]
    return [stop - start for start, stop in pairwise(borders)]


def make_halo_plan(grid: ModeGrid, local_seqlen: int, cp_size: int) -> list[Interval]:
    """Return the intervals of tokens that branch 1 reads before each shard, in order.

    Empty if branch 1 reads one block only.
    """
    plan = []
    reach = (grid.local_blocks - 1) * grid.block
    for dst in range(cp_size):
        start = dst * local_seqlen
        low = max(0, start - reach)
        for src in range(low // local_seqlen, dst):
            first = src * local_seqlen
            plan.append((src, dst, max(low - first, 0), local_seqlen))
    return plan


def count_halo_tokens(plan: Sequence[Interval], rank: int) -> int:
    """Return the number of tokens that `rank` receives."""
    return sum(stop - start for _, dst, start, stop in plan if dst == rank)


def count_halo(plan: Sequence[Interval], cp_size: int) -> tuple[list[int], list[int]]:
    """Return the tokens that each rank sends, and those that it receives."""
    sent, received = [0] * cp_size, [0] * cp_size
    for src, dst, start, stop in plan:
        sent[src] += stop - start
        received[dst] += stop - start
    return sent, received


def reverse_halo_plan(plan: Sequence[Interval]) -> list[Interval]:
    """Return the plan that sends gradients of the halo back, in the same order.

    Its intervals count tokens of the receiver's halo.
    """
    offsets, result = {}, []
    for src, dst, start, stop in plan:
        first = offsets.get(dst, 0)
        offsets[dst] = first + stop - start
        result.append((dst, src, first, offsets[dst]))
    return result


class ShardPlan(NamedTuple):
    """Exchange and work of one rank.

    units_per_rank: units of the coarsest mode on each rank.
    halo: plan of the halo's keys and values; empty without a halo.
    reversed_halo: plan of the halo's gradients.
    send_ranges: local tokens that this rank sends for halos, in plan order.
    key_ids: global numbers of the keys that branch 1 has: the halo, then own tokens.
    key_starts: the first token of each one's document.
    block_starts: the first block of the document of each block of the whole sequence.
    branches: those of own tokens, finest first, then that of own units.
    """

    units_per_rank: list[int]
    halo: list[Interval]
    reversed_halo: list[Interval]
    send_ranges: list[tuple[int, int]]
    key_ids: Tensor
    key_starts: Tensor
    block_starts: Tensor
    branches: list[Branch]


@cached_plan
def make_shard_plan(
    grid: ModeGrid, nheads_kv: int, key: LayoutKey, documents: tuple[int, ...] | None
) -> ShardPlan:
    """Plan one rank's exchange and work; the layout is contiguous."""
    local_seqlen = key.seqlen // key.cp_size
    halo = make_halo_plan(grid, local_seqlen, key.cp_size) if grid.modes else []
    token_ids = token_table("token_ids", key, None, CPU)
    starts = token_table("starts", key, documents, CPU)
    begin = int(token_ids[0])
    key_ids = torch.arange(begin - count_halo_tokens(halo, key.rank), begin + local_seqlen)
    borders = None if documents is None else torch.tensor(documents)
    all_starts = document_starts(borders, torch.arange(key.seqlen), key.seqlen)
    modes = range(len(grid.modes))
    branches = [ops.fine_branch(mode, token_ids, starts, key_ids, grid) for mode in modes]
    # Units are fibres already: their blocks are the tokens of a sequence.
    branches.append(Branch(ops.coarsest_branch(all_starts, grid).band))
    return ShardPlan(
        count_units(grid, nheads_kv, key.cp_size),
        halo,
        reverse_halo_plan(halo),
        [(start, stop) for src, _, start, stop in halo if src == key.rank],
        key_ids,
        all_starts[key_ids],
        (all_starts[:: grid.block] // grid.block).clone(),
        branches,
    )


def traffic(options: TensorizedOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends in one layer; cp_size = 1 sends nothing.

    Forward: q, k and U to the units; from them out in the dtype of q and lse in fp32 or wider; the
    halo of k and v. Backward: dout, lse and delta to the units; from them dq, dk and dU; the halo's
    gradients in fp32 or wider.
    """
    cp, wide = layout.cp_size, max(4, shape.itemsize)
    heads = shape.heads or HeadSlice(0, shape.nheads, 0, shape.nheads_kv)
    grid = make_grid(options, heads, (shape.nheads, shape.nheads_kv))
    group = shape.nheads // shape.nheads_kv
    hop_group = group if grid.modes and grid.hop_heads == "q" else 1
    row = shape.head_dim * shape.itemsize
    halo_row = 2 * shape.batch * shape.nheads_kv * shape.head_dim
    blocks = shape.batch * (layout.local_seqlen // grid.block)
    units_per_rank, forward, backward = count_units(grid, shape.nheads_kv, cp), [], []
    all_units = sum(units_per_rank)
    sent, received = count_halo(make_halo_plan(grid, layout.local_seqlen, cp), cp)
    for rank, units in enumerate(units_per_rank):
        to_units = blocks * (all_units - units)  # own blocks, units of other ranks
        to_tokens = blocks * (cp - 1) * units  # blocks of other ranks, own units
        forward.append(
            to_units * (group + 1 + hop_group) * row
            + to_tokens * group * (row + wide)
            + sent[rank] * halo_row * shape.itemsize
        )
        backward.append(
            to_units * group * (row + 2 * wide)
            + to_tokens * (group + 1 + hop_group) * row
            + received[rank] * halo_row * wide
        )
    return Traffic(tuple(forward), tuple(backward))


def kept_bytes(options: TensorizedOptions, shape: Shape, layout: ContextLayout) -> int:
    """Count out, lse, the U_j and lambda_j; on several ranks units' q, k and U, and the halo."""
    heads = shape.heads or HeadSlice(0, shape.nheads, 0, shape.nheads_kv)
    grid, cp = make_grid(options, heads, (shape.nheads, shape.nheads_kv)), layout.cp_size
    group = shape.nheads // shape.nheads_kv
    hop_group = group if grid.modes and grid.hop_heads == "q" else 1
    row, wide = shape.head_dim * shape.itemsize, max(4, shape.itemsize)
    # On one rank a sequence is padded to whole blocks.
    blocks = shape.batch * -(-layout.local_seqlen // grid.block)
    tokens = blocks * grid.block
    kept = tokens * shape.nheads * (row + wide)
    kept += len(grid.modes) * tokens * hop_group * shape.nheads_kv * (row + wide)
    if cp == 1:
        return kept
    units = max(count_units(grid, shape.nheads_kv, cp))
    halo = max(count_halo(make_halo_plan(grid, layout.local_seqlen, cp), cp)[1])
    kept += 2 * shape.batch * halo * shape.nheads_kv * row
    received = group + 1 + hop_group
    # Of several heads a copy is kept beside the received tensor, which the key head keeps alive.
    received += sum(width for width in (group, hop_group) if width > 1)
    return kept + blocks * cp * units * received * row

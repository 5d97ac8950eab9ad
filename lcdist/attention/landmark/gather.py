"""Landmark attention with top_k: gather all landmarks, then only the selected blocks (2305.16300).

Keys of landmarks, one per block_size tokens, are gathered from every rank. Each selection unit
selects past blocks by them. The selected blocks of keys and values are requested, once per rank,
batch row and key head. Their gradients return in fp32 or wider and are added in rank order. The
selection itself is not differentiated.

Messages have the sizes of what is selected, so the host reads the selection once, and how many
blocks each rank requests. Own blocks are computed while selected ones travel, and so are own
gradients while those of selected blocks return.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.attention.context import CPU, AttentionContext, LayoutKey, token_table
from lcdist.attention.landmark.ring import query_rows
from lcdist.attention.shared.plan_cache import cached_plan
from lcdist.exchange import Pending, gather
from lcdist_kernels.landmark import (
    TORCH_IMPL,
    BlockLists,
    LandmarkImpl,
    QueryRows,
    SparseContext,
    SparseFunction,
    landmark_partial,
    landmarks,
    sparse_partial,
    table_of,
    unit_lengths,
)
from lcdist_kernels.partial import merge
from lcdist_kernels.tape import kept, records, replays


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, impl: LandmarkImpl, ctx: AttentionContext
) -> Tensor:
    """Return out of rotated q, k, v; own blocks are computed while the others are in flight."""
    found = _select(q, k, v, impl, ctx)
    first = int(found.rows.idx[0])
    sparse = SparseContext(found.lists, found.rows, first, ctx.softmax_scale, impl)
    own = None
    if replays():
        table, send_back = kept(tuple)
    else:
        pending = found.request(found.own_table.detach(), ctx)
        own = sparse.own_partial(q, k, v)
        table, send_back = pending.wait(), pending.adjoint
        if records():
            kept(lambda: (table.to(q.dtype), send_back))
    return SparseFunction.apply(q, k, v, found.own_table, table, own, send_back, sparse)


def reference_selected(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return out of rotated q, k, v with dense maths and gradients by autograd.

    `attend_selected` is tested against it.
    """
    found = _select(q, k, v, TORCH_IMPL, ctx)
    rows, lists, table = found.rows, found.lists, found.request(found.own_table, ctx).wait()
    # Entry 0 stands for -1, no block, and keeps an empty table in the graph.
    table = torch.cat((table.new_zeros((1, *table.shape[1:])), table))
    ids_by_row = lists.ids.repeat_interleave(lists.lengths.to(q.device), 2)
    past = sparse_partial(q, table, ids_by_row + 1, ~lists.hidden(rows), ctx.softmax_scale)
    none = torch.zeros((), dtype=torch.bool, device=q.device)
    k_start = rows.idx[:: rows.block_size]
    own = landmark_partial(q, k, v, rows, k_start, ctx.softmax_scale, none)
    return merge(*own, *past)[0].to(q.dtype)


class _Selection(NamedTuple):
    """Hold the blocks that a rank's units read.

    Attributes:
        rows: own queries.
        own_table: own blocks, as they are sent to others.
        requested: entries of all ranks' tables, increasing; empty in a second run.
        lists: of the units, among the entries.
    """

    rows: QueryRows
    own_table: Tensor
    requested: list[int]
    lists: BlockLists

    def request(self, own_table: Tensor, ctx: AttentionContext) -> Pending:
        """Request the blocks."""
        return gather(own_table, ctx.group, dim=0, blocks=self.requested, block_size=1, wide=True)


def _select(
    q: Tensor, k: Tensor, v: Tensor, impl: LandmarkImpl, ctx: AttentionContext
) -> _Selection:
    """Gather the landmarks of all ranks and select blocks by them."""
    options = ctx.options
    keys = landmarks(k.detach(), options.block_size).contiguous()
    pending_keys = None if replays() else gather(keys, ctx.group)
    rows = query_rows(ctx)
    lengths = make_unit_lengths(options.select_tokens, ctx.layout_key, ctx.documents)
    own_table = table_of(k, v, options.block_size)
    numbering = TableNumbering(ctx.layout.cp_size, keys.shape[1], keys.shape[0], keys.shape[2])
    requested: list[int] = []

    def choose() -> tuple[Tensor, Tensor]:
        assert options.top_k is not None and pending_keys is not None
        units = (rows, lengths, options.top_k)
        selected = impl.choose_blocks(q.detach(), pending_keys.wait(), *units, ctx.softmax_scale)
        named, ids = numbering.requests(selected)
        # The only wait for the device before blocks are requested.
        requested.extend(entry for entry, flag in enumerate(named.tolist()) if flag)
        return named.nonzero_static(size=len(requested)).flatten(), ids

    entries, ids = kept(choose)
    lists = BlockLists(numbering.block_numbers(entries), ids, lengths)
    return _Selection(rows, own_table, requested, lists)


@cached_plan
def make_unit_lengths(
    select_tokens: int, key: LayoutKey, documents: tuple[int, ...] | None
) -> Tensor:
    """Return the number of tokens in each of a rank's selection units: see `unit_lengths`."""
    token_ids = token_table("token_ids", key, None, CPU)
    return unit_lengths(token_ids, token_table("starts", key, documents, CPU), select_tokens)


class TableNumbering(NamedTuple):
    """Numbers of (block, batch row, key head) in all ranks' tables, concatenated in rank order.

    ranks: number of ranks. blocks_per_rank: blocks of a shard. batch, nheads_kv: of the keys.
    """

    ranks: int
    blocks_per_rank: int
    batch: int
    nheads_kv: int

    @property
    def entries_per_rank(self) -> int:
        return self.batch * self.nheads_kv * self.blocks_per_rank

    def requests(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Return which table entries to request, and each selected block's place among them.

        Nothing here waits for the device.

        Args:
            selected: global block numbers `[b, h_kv, units, K]`, negative for none.

        Returns:
            A flag for each entry of all ranks' tables; and places among the flagged entries, int32,
            shaped like `selected`, -1 for none.
        """
        owner = selected.long() // self.blocks_per_rank
        head = torch.arange(self.batch * self.nheads_kv, device=selected.device)
        row = head.view(self.batch, self.nheads_kv, 1, 1) * self.blocks_per_rank
        entries = owner * self.entries_per_rank + row + selected % self.blocks_per_rank
        # One more entry stands for none.
        last = self.ranks * self.entries_per_rank
        none = selected < 0
        entries = entries.masked_fill_(none, last).flatten()
        flags = torch.zeros(last + 1, dtype=torch.int32, device=selected.device)
        flags.index_fill_(0, entries, 1)
        places = flags.cumsum(0, dtype=torch.int32)[entries] - 1
        return flags[:last].bool(), places.view_as(selected).masked_fill_(none, -1)

    def block_numbers(self, entries: Tensor) -> Tensor:
        """Return the global block number of each table entry."""
        owner = entries // self.entries_per_rank
        return owner * self.blocks_per_rank + entries % self.blocks_per_rank

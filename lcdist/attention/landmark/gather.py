"""Landmark attention with top_k: gather all landmarks, then only the selected blocks (2305.16300).

Keys of landmarks, one per block_size tokens, are gathered from every rank. Each selection unit
selects past blocks by them. The selected blocks of keys and values are requested, once per rank,
batch row and key head. Their gradients return in fp32 or wider and are added in rank order. The
selection itself is not differentiated.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.attention.context import CPU, AttentionContext, LayoutKey, token_table
from lcdist.attention.landmark.ring import query_rows
from lcdist.attention.shared.plan_cache import cached_plan
from lcdist.exchange import Pending, gather
from lcdist_kernels.common import wide_dtype
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
    if replays():
        return SparseFunction.apply(q, k, v, _received_before(found.own_table), None, sparse)
    pending = found.request(ctx)
    own = sparse.own_partial(q, k, v)
    table = pending.wait()
    if records():
        kept(lambda: (table.to(q.dtype), pending.adjoint))
    return SparseFunction.apply(q, k, v, table, own, sparse)


def _received_before(own_table: Tensor) -> Tensor:
    """Return the blocks that the first run received, with the gradients' way back."""
    table, adjoint = kept(tuple)
    wide = wide_dtype(table.dtype)
    return Pending(own_table, lambda _: lambda: table.to(wide), adjoint).wait()


def reference_selected(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return out of rotated q, k, v with dense maths and gradients by autograd.

    `attend_selected` is tested against it.
    """
    found = _select(q, k, v, TORCH_IMPL, ctx)
    rows, lists, table = found.rows, found.lists, found.request(ctx).wait()
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
        requested: entries of all ranks' tables.
        lists: of the units, among the entries.
    """

    rows: QueryRows
    own_table: Tensor
    requested: Tensor
    lists: BlockLists

    def request(self, ctx: AttentionContext) -> Pending:
        """Request the blocks."""
        blocks = {"blocks": self.requested, "block_size": 1}
        return gather(self.own_table, ctx.group, dim=0, **blocks, wide=True)


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
    numbering = TableNumbering(keys.shape[1], keys.shape[0], keys.shape[2])

    def choose() -> tuple[Tensor, Tensor]:
        assert options.top_k is not None and pending_keys is not None
        units = (rows, lengths, options.top_k)
        selected = impl.choose_blocks(q.detach(), pending_keys.wait(), *units, ctx.softmax_scale)
        return numbering.requests(selected)

    requested, ids = kept(choose)
    lists = BlockLists(numbering.block_numbers(requested), ids, lengths)
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

    blocks_per_rank: blocks of a rank's shard. batch, nheads_kv: sizes of the keys.
    """

    blocks_per_rank: int
    batch: int
    nheads_kv: int

    @property
    def entries_per_rank(self) -> int:
        return self.batch * self.nheads_kv * self.blocks_per_rank

    def requests(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the table entries to request and the position of each selected block among them.

        Args:
            selected: global block numbers `[b, h_kv, units, K]`, negative for none.

        Returns:
            Distinct entries, increasing, int64; and their ids, int32, shaped like `selected`, -1
            for none.
        """
        owner = selected.long() // self.blocks_per_rank
        head = torch.arange(self.batch * self.nheads_kv, device=selected.device)
        row = head.view(self.batch, self.nheads_kv, 1, 1) * self.blocks_per_rank
        entries = owner * self.entries_per_rank + row + selected % self.blocks_per_rank
        none = selected < 0
        requested = entries[~none].unique()
        ids = torch.searchsorted(requested, entries).int().masked_fill(none, -1)
        return requested, ids

    def block_numbers(self, entries: Tensor) -> Tensor:
        """Return the global block number of each table entry."""
        owner = entries // self.entries_per_rank
        return owner * self.blocks_per_rank + entries % self.blocks_per_rank

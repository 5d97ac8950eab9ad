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


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, impl: LandmarkImpl, ctx: AttentionContext
) -> Tensor:
    """Return out of rotated q, k, v; own blocks are computed while the others are in flight."""
    rows, pending, lists = _select_and_request(q, k, v, impl, ctx)
    sparse = SparseContext(lists, rows, int(rows.idx[0]), ctx.softmax_scale, impl)
    own = sparse.own_partial(q, k, v)
    return SparseFunction.apply(q, k, v, pending.wait(), own, sparse)


def reference_selected(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return out of rotated q, k, v with dense maths and gradients by autograd.

    `attend_selected` is tested against it.
    """
    rows, pending, lists = _select_and_request(q, k, v, TORCH_IMPL, ctx)
    table = pending.wait()
    # Entry 0 stands for -1, no block, and keeps an empty table in the graph.
    table = torch.cat((table.new_zeros((1, *table.shape[1:])), table))
    ids_by_row = lists.ids.repeat_interleave(lists.lengths.to(q.device), 2)
    past = sparse_partial(q, table, ids_by_row + 1, ~lists.hidden(rows), ctx.softmax_scale)
    none = torch.zeros((), dtype=torch.bool, device=q.device)
    k_start = rows.idx[:: rows.block_size]
    own = landmark_partial(q, k, v, rows, k_start, ctx.softmax_scale, none)
    return merge(*own, *past)[0].to(q.dtype)


def _select_and_request(
    q: Tensor, k: Tensor, v: Tensor, impl: LandmarkImpl, ctx: AttentionContext
) -> tuple[QueryRows, Pending, BlockLists]:
    """Select blocks and request them; return own queries, the pending table, and the lists."""
    options = ctx.options
    keys = landmarks(k.detach(), options.block_size).contiguous()
    pending_keys = gather(keys, ctx.group)
    rows = query_rows(ctx)
    lengths = make_unit_lengths(options.select_tokens, ctx.layout_key, ctx.documents)
    own_table = table_of(k, v, options.block_size)
    assert options.top_k is not None
    selected = impl.choose_blocks(
        q.detach(), pending_keys.wait(), rows, lengths, options.top_k, ctx.softmax_scale
    )
    numbering = TableNumbering(keys.shape[1], keys.shape[0], keys.shape[2])
    requested, ids = numbering.requests(selected)
    pending = gather(own_table, ctx.group, dim=0, blocks=requested, block_size=1, wide=True)
    return rows, pending, BlockLists(numbering.block_numbers(requested), ids, lengths)


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

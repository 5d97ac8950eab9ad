"""The landmark block gather: landmarks come from all ranks, then chosen blocks (2305.16300).

Keys of landmarks, one in block_size tokens, are gathered from every rank; each selection unit
chooses its past blocks by them; the chosen blocks of keys and values are asked for by name, once a
rank, batch row and key head, and their gradients go home in fp32 at least, to be added in the order
of ranks. What a unit chooses is not differentiated.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist.attention.shared.checks import tokens
from lcdist.config.schema import LandmarkOptions
from lcdist.exchange import Group, Pending, gather, group_rank
from lcdist.layout import ContextLayout
from lcdist_kernels.landmark import (
    TORCH_IMPL,
    BlockLists,
    LandmarkImpl,
    QueryRows,
    SparseContext,
    SparseFunction,
    choose_blocks,
    landmark_partial,
    landmarks,
    sparse_partial,
    table_of,
    unit_lengths,
)
from lcdist_kernels.partial import merge


@dataclass(frozen=True)
class Fetch:
    """What a rank needs in order to choose, to fetch and to attend; the layout is contiguous."""

    layout: ContextLayout
    group: Group
    cu_seqlens: Tensor | None
    softmax_scale: float
    options: LandmarkOptions
    operator: LandmarkImpl = TORCH_IMPL

    @property
    def block_size(self) -> int:
        return self.options.block_size

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """out of rotated q, k, v: own blocks are attended to while the others are on their way."""
        rows, pending, lists = self._order(q, k, v)
        reading = SparseContext(lists, rows, int(rows.idx[0]), self.softmax_scale, self.operator)
        own = reading.own_partial(q, k, v)
        return SparseFunction.apply(q, k, v, pending.wait(), own, reading)

    def dense(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The same with dense maths and gradients by autograd."""
        rows, pending, lists = self._order(q, k, v)
        table = pending.wait()
        # The entry in front is what -1 stands for, and keeps an empty table in the graph.
        table = torch.cat((table.new_zeros((1, *table.shape[1:])), table))
        of_row = lists.ids.repeat_interleave(lists.lengths.to(q.device), 2)
        past = sparse_partial(q, table, of_row + 1, ~lists.hidden(rows), self.softmax_scale)
        none = torch.zeros((), dtype=torch.bool, device=q.device)
        k_start = rows.idx[:: self.block_size]
        own = landmark_partial(q, k, v, rows, k_start, self.softmax_scale, none)
        return merge(*own, *past)[0].to(q.dtype)

    def _order(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[QueryRows, Pending, BlockLists]:
        """Chooses, and asks for what was chosen: this rank's rows, the table to come, the lists."""
        keys = landmarks(k.detach(), self.block_size).contiguous()
        coming = gather(keys, self.group)
        index, starts = tokens(self.layout, group_rank(self.group), self.cu_seqlens)
        rows = QueryRows(index, starts, self.block_size)
        lengths = unit_lengths(index, starts, self.options.select_tokens)
        own_table = table_of(k, v, self.block_size)
        assert self.options.top_k is not None
        chosen = choose_blocks(
            q.detach(), coming.wait(), rows, lengths, self.options.top_k, self.softmax_scale
        )
        place = _Places(keys.shape[1], keys.shape[0], keys.shape[2])
        wanted, ids = place.of(chosen)
        pending = gather(own_table, self.group, dim=0, blocks=wanted, block_size=1, wide=True)
        return rows, pending, BlockLists(place.number(wanted), ids, lengths)


@dataclass(frozen=True)
class _Places:
    """Where a block of one batch row and key head stands in all ranks' tables, end to end."""

    blocks_of_rank: int
    batch: int
    nheads_kv: int

    @property
    def entries_of_rank(self) -> int:
        return self.batch * self.nheads_kv * self.blocks_of_rank

    def of(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Of what is `chosen` `[b, h_kv, units, K]`: the places, each once, and ids among them."""
        owner = chosen.long() // self.blocks_of_rank
        head = torch.arange(self.batch * self.nheads_kv, device=chosen.device)
        row = head.view(self.batch, self.nheads_kv, 1, 1) * self.blocks_of_rank
        places = owner * self.entries_of_rank + row + chosen % self.blocks_of_rank
        none = chosen < 0
        wanted = places[~none].unique()
        ids = torch.searchsorted(wanted, places).int().masked_fill(none, -1)
        return wanted, ids

    def number(self, places: Tensor) -> Tensor:
        """The number in the whole sequence of the blocks at `places`."""
        owner = places // self.entries_of_rank
        return owner * self.blocks_of_rank + places % self.blocks_of_rank

"""Landmark attention over lists of past blocks (top_k), tile by tile, gradients by hand.

Each selection unit has one list per key head, of blocks in a table. The table holds the rank's own
blocks or fetched ones. Every row of a unit walks the same list; a listed block that is not past for
a row is hidden from it. A tile holds rows of one unit, or of several short units, each with its own
blocks. So what a row computes does not depend on other units' choices, to the last bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.landmark.block_gates import GateAccumulator, GateGrads
from lcdist_kernels.landmark.blocks import QueryRows, block_starts, runs_of
from lcdist_kernels.landmark.tiled import own_bwd, own_fwd
from lcdist_kernels.partial import merge
from lcdist_kernels.tiles import BLOCK, SCORES_AT_ONCE, fold, unfold

# Elements of keys gathered from the table at once: 8 MiB in fp32, and as many of values.
KEYS_AT_ONCE = 1 << 21


class BlockLists(NamedTuple):
    """Lists of blocks that selection units read.

    Attributes:
        numbers: the block number of each entry of the table, int64 `[m]`.
        ids: entries of the table, int32 `[b, h_kv, units, K]`; -1: none.
        lengths: rows of each unit, int64 on the CPU.
    """

    numbers: Tensor
    ids: Tensor
    lengths: Tensor

    @property
    def by_head(self) -> Tensor:
        """Return ids as `[b * h_kv, units, K]`."""
        return self.ids.flatten(0, 1)

    def hidden(self, rows: QueryRows) -> Tensor:
        """Return which listed blocks a row may not read: bool `[b, h_kv, s, K]`."""
        of_row = self.ids.repeat_interleave(self.lengths.to(self.ids.device), 2)
        return _hidden_mask(of_row, self.numbers, rows)


class _Tile(NamedTuple):
    """Ranges of heads, units, and rows within each unit; start: first row of the units."""

    heads: slice
    units: slice
    rows: slice
    start: int
    length: int

    def select(self, x: Tensor) -> Tensor:
        """Return the tile's rows of x `[u, g, s, ...]`: a view `[heads, g, units, rows, ...]`."""
        count = self.units.stop - self.units.start
        whole = x[self.heads, :, self.start : self.start + count * self.length]
        return whole.unflatten(2, (count, self.length))[:, :, :, self.rows]


def sparse_fwd(
    q: Tensor, table: Tensor, lists: BlockLists, rows: QueryRows, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the partial (out `[b, s, h, d]`, lse `[b, h, s]`) of q over its units' lists.

    q `[b, s, h, d]`, rotated. table `[m, 2, L, d]`: m blocks of rotated keys and values, each of
    one key head. The result is in the wider of fp32 and q.dtype. A query that sees nothing has out
    = 0, lse = -inf.
    """
    shape, nheads_kv = q.shape, lists.ids.shape[1]
    q = fold(q, nheads_kv)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    work = _TileWork(q, table, lists, rows)
    scratch = q.new_empty(2, work.scores)
    for tile in work.tiles():
        gates = GateAccumulator(work.gather_rows(tile, q) * softmax_scale)
        for ids, hidden in work.blocks(tile):
            gates.add(*work.gather_blocks(ids), hidden, rows.block_size, scratch)
        for whole, part in zip((out, lse), gates.result(), strict=True):
            work.scatter_rows(tile, whole, part)
    return unfold(out, shape), lse.view(shape[0], shape[2], shape[1])


def sparse_bwd(
    dout: Tensor, q: Tensor, table: Tensor, out: Tensor, lse: Tensor, lists: BlockLists,
    rows: QueryRows, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the share of dq, and dtable `[m, 2, L, d]`, through the lists.

    dout, out: like q. lse `[b, h, s]`. out and lse are over all keys that the queries see. Other
    arguments as in `sparse_fwd`. The result is in the wider of fp32 and q.dtype and deterministic.
    """
    shape, nheads_kv = q.shape, lists.ids.shape[1]
    dout, q, out = (fold(x, nheads_kv) for x in (dout, q, out))
    delta = (dout * out).sum(-1)
    lse = lse.reshape(delta.shape)
    # `out` is no longer needed: its buffer takes dq.
    dq, dtable = out.zero_(), torch.zeros(table.shape, dtype=q.dtype, device=q.device)
    work = _TileWork(q, table, lists, rows)
    scratch = q.new_empty(3, work.scores)
    for tile in work.tiles():
        grads = GateGrads(
            work.gather_rows(tile, dout),
            work.gather_rows(tile, q) * softmax_scale,
            work.gather_rows(tile, lse[..., None]),
            work.gather_rows(tile, delta[..., None]),
        )
        for ids, hidden in work.blocks(tile):
            keys = work.gather_blocks(ids)
            dkeys = (torch.zeros_like(keys[0]), torch.zeros_like(keys[1]))
            grads.add(keys, dkeys, hidden, rows.block_size, scratch)
            for i, part in enumerate(dkeys):
                _add_rows(dtable.view(-1, *table.shape[2:]), 2 * ids + i, part)
        work.scatter_rows(tile, dq, grads.dq)
    return unfold(dq.mul_(softmax_scale), shape), dtable


def local_fwd(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lengths: Tensor, rows: QueryRows,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out `[b, s, h, d]` in q's dtype, lse `[b, h, s]`) over own and chosen blocks.

    Args:
        k, v: all keys by slot, `[b, n L, h_kv, d]`; k rotated.
        chosen: blocks that each unit reads, int32 `[b, h_kv, units, K]`; -1: none.
        lengths: rows of each unit, int64 on the CPU.
        other: as in `sparse_fwd`.
    """
    lists = list_blocks(chosen, k.shape[1] // rows.block_size, lengths)
    own = own_fwd(q, k, v, rows, block_starts(k.shape[1], rows.block_size), softmax_scale)
    past = sparse_fwd(q, table_of(k, v, rows.block_size), lists, rows, softmax_scale)
    out, lse = merge(*own, *past)
    return out.to(q.dtype), lse


def local_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, chosen: Tensor,
    lengths: Tensor, rows: QueryRows, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv), in q's dtype; arguments as in `local_fwd` and `sparse_bwd`."""
    lists = list_blocks(chosen, k.shape[1] // rows.block_size, lengths)
    table, known = table_of(k, v, rows.block_size), (dout, q, k, v, out, lse, rows)
    share, dtable = sparse_bwd(dout, q, table, out, lse, lists, rows, softmax_scale)
    del table
    dq, dk, dv = own_bwd(*known, block_starts(k.shape[1], rows.block_size), softmax_scale)
    dq.add_(share)
    for total, part in zip((dk, dv), keys_of(dtable, k.shape), strict=True):
        total.add_(part)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def list_blocks(chosen: Tensor, num_blocks: int, lengths: Tensor) -> BlockLists:
    """Return lists over entries of `table_of` for chosen blocks `[b, h_kv, units, K]`."""
    num_heads = chosen.shape[0] * chosen.shape[1]
    numbers = torch.arange(num_blocks, device=chosen.device).repeat(num_heads)
    first = torch.arange(num_heads, device=chosen.device, dtype=torch.int32) * num_blocks
    ids = chosen + first.view(*chosen.shape[:2], 1, 1)
    return BlockLists(numbers, ids.masked_fill(chosen < 0, -1), lengths)


class _TileWork:
    """Tiles of rows and lists, and the blocks that a tile gathers from the table."""

    def __init__(self, q: Tensor, table: Tensor, lists: BlockLists, rows: QueryRows) -> None:
        self.num_heads, self.group = q.shape[:2]
        self.table, self.rows, self.wide = table.reshape(-1, *table.shape[2:]), rows, q.dtype
        self.ids, self.lists = lists.by_head, lists
        self.blocks_at_once = min(max(1, BLOCK // rows.block_size), max(1, self.ids.shape[2]))
        self.keys = self.blocks_at_once * rows.block_size
        self.rows_at_once = max(1, BLOCK // self.group)

    @property
    def scores(self) -> int:
        """Return the greatest number of scores of a tile."""
        return max((x * self.group * r * self.keys for x, r in map(self._size, self._runs())))

    def _runs(self) -> list[int]:
        return self.lists.lengths.unique().tolist()

    def _size(self, length: int) -> tuple[int, int]:
        """Return the units (of any key head) at once, and the rows of each."""
        rows = min(length, self.rows_at_once)
        room = SCORES_AT_ONCE // (self.group * rows * self.keys)
        room = min(room, KEYS_AT_ONCE // (self.keys * self.table.shape[2]))
        return max(1, min(room, self.num_heads * len(self.lists.lengths))), rows

    def tiles(self) -> Iterator[_Tile]:
        """Yield all tiles."""
        if not len(self.table) or not self.ids.shape[2]:
            return
        for run in runs_of(self.lists.lengths):
            at_once, step = self._size(run.length)
            heads = min(at_once, self.num_heads)
            units = at_once // heads
            for i in range(0, run.count, units):
                first, last = run.first + i, run.first + min(i + units, run.count)
                start = run.start + i * run.length
                for row in range(0, run.length, step):
                    rows = slice(row, min(row + step, run.length))
                    for head in range(0, self.num_heads, heads):
                        some = slice(head, min(head + heads, self.num_heads))
                        yield _Tile(some, slice(first, last), rows, start, run.length)

    def gather_rows(self, tile: _Tile, x: Tensor) -> Tensor:
        """Return [heads * units, g * rows, ...] of x [u, g, s, ...]: a copy."""
        return tile.select(x).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def scatter_rows(self, tile: _Tile, whole: Tensor, part: Tensor) -> None:
        """Write `part`, as from `gather_rows`, into `whole`."""
        target = tile.select(whole).transpose(1, 2)
        target.copy_(part.view(target.shape))

    def blocks(self, tile: _Tile) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield entries of the table [heads * units, k], some at a time, and their mask.

        The mask [heads * units, 1, rows, k] is True where an entry is hidden from a row.
        """
        index = torch.arange(tile.start, tile.start + self._rows_in(tile))
        of_tile = index.view(-1, tile.length)[:, tile.rows]
        idx, lo = self.rows.idx[of_tile], self.rows.lo[of_tile]
        ids = self.ids[tile.heads, tile.units]
        for i in range(0, ids.shape[2], self.blocks_at_once):
            some = ids[:, :, None, i : i + self.blocks_at_once]
            hidden = _hidden_mask(
                some, self.lists.numbers, QueryRows(idx, lo, self.rows.block_size)
            )
            if not bool(hidden.all()):
                yield some.flatten(0, 2).clamp(min=0).long(), hidden.flatten(0, 1)[:, None]

    @staticmethod
    def _rows_in(tile: _Tile) -> int:
        """Return the rows of a tile's units."""
        return (tile.units.stop - tile.units.start) * tile.length

    def gather_blocks(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [heads * units, k * L, d] of entries."""
        k, v = (self.table.index_select(0, 2 * ids.flatten() + i).to(self.wide) for i in (0, 1))
        shape = (len(ids), -1, k.shape[2])
        return k.view(shape), v.view(shape)


def _hidden_mask(ids: Tensor, numbers: Tensor, rows: QueryRows) -> Tensor:
    """Return the mask [..., s, K] of ids [..., s or 1, K] hidden from rows [..., s]."""
    if not len(numbers):
        return torch.ones_like(ids, dtype=torch.bool)
    begins = numbers[ids.clamp(min=0).long()] * rows.block_size
    return (ids < 0) | (begins > rows.past[0].to(ids.device)[..., None])


def _add_rows(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Add rows to the table in order: index_add_ on a CPU, index_put_ on CUDA."""
    rows = rows.view(-1, *table.shape[1:])
    if rows.is_cuda:
        table.index_put_((ids.flatten(),), rows, accumulate=True)
    else:
        table.index_add_(0, ids.flatten(), rows)


def table_of(k: Tensor, v: Tensor, block_size: int) -> Tensor:
    """Return k, v `[b, n L, h_kv, d]` by block: `[b * h_kv * n, 2, L, d]`; differentiable."""
    blocks = torch.stack([x.unflatten(1, (-1, block_size)) for x in (k, v)], 2)
    return blocks.permute(0, 4, 1, 2, 3, 5).flatten(0, 2)  # of [b, n, 2, L, h_kv, d]


def keys_of(table: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return k, v `[b, n L, h_kv, d]` of a table: inverse of `table_of`; views where possible."""
    blocks = table.unflatten(0, (shape[0], shape[2], -1))  # [b, h_kv, n, 2, L, d]
    k, v = blocks.permute(3, 0, 2, 4, 1, 5).flatten(2, 3)
    return k, v

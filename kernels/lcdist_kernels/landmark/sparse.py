"""Landmark attention over lists of past blocks: what top_k reads, tile by tile, gradients by hand.

Each selection unit has a list for each key head, of blocks in a table: its own rank's, or those
fetched for it. Every row of a unit goes through the same list, and a listed block that is not past
for a row is hidden from it. A tile holds rows of one unit, or where units are short of many, each
with its own blocks: what a row computes never hangs on what others chose, to the last bit.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.landmark.block_gates import GateGrads, Gates
from lcdist_kernels.landmark.blocks import QueryRows, runs_of
from lcdist_kernels.tiles import BLOCK, SCORES_AT_ONCE, fold, unfold

# Elements of keys that are taken from the table at once: 8 MiB in fp32, and values as many.
KEYS_AT_ONCE = 1 << 21


class BlockLists(NamedTuple):
    """What each unit reads.

    numbers: the block number of each entry of the table, int64 `[m]`. ids: entries of the table,
    int32 `[b, h_kv, units, K]`, -1 for none. lengths: rows of each unit, int64 on the CPU.
    """

    numbers: Tensor
    ids: Tensor
    lengths: Tensor

    @property
    def by_head(self) -> Tensor:
        """ids as `[b * h_kv, units, K]`."""
        return self.ids.flatten(0, 1)

    def hidden(self, rows: QueryRows) -> Tensor:
        """Which of the listed blocks no row may read: bool `[b, h_kv, s, K]`."""
        of_row = self.ids.repeat_interleave(self.lengths.to(self.ids.device), 2)
        return _hidden(of_row, self.numbers, rows)


class _Tile(NamedTuple):
    """heads [0], units [1] and rows within each unit [2], all ranges; start: first row of all."""

    heads: slice
    units: slice
    rows: slice
    start: int
    length: int

    def of(self, x: Tensor) -> Tensor:
        """The tile's rows of x `[u, g, s, ...]`: a view `[heads, g, units, rows, ...]`."""
        count = self.units.stop - self.units.start
        whole = x[self.heads, :, self.start : self.start + count * self.length]
        return whole.unflatten(2, (count, self.length))[:, :, :, self.rows]


def sparse_fwd(
    q: Tensor, table: Tensor, lists: BlockLists, rows: QueryRows, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The partial (out `[b, s, h, d]`, lse `[b, h, s]`) of rotated q over its units' lists.

    q `[b, s, h, d]`; table `[m, 2, L, d]`, m blocks of rotated keys and values, of one key head
    each. Result in the wider of fp32 and q.dtype; a query that sees nothing has out = 0,
    lse = -inf.
    """
    shape, nheads_kv = q.shape, lists.ids.shape[1]
    q = fold(q, nheads_kv)
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)
    steps = _Steps(q, table, lists, rows)
    scratch = q.new_empty(2, steps.scores)
    for tile in steps.tiles():
        gates = Gates(steps.rows_of(tile, q) * softmax_scale)
        for ids, hidden in steps.blocks(tile):
            gates.add(*steps.take(ids), hidden, rows.block_size, scratch)
        for whole, part in zip((out, lse), gates.done(), strict=True):
            steps.put(tile, whole, part)
    return unfold(out, shape), lse.view(shape[0], shape[2], shape[1])


def sparse_bwd(
    dout: Tensor, q: Tensor, table: Tensor, out: Tensor, lse: Tensor, lists: BlockLists,
    rows: QueryRows, softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The share of dq, and dtable `[m, 2, L, d]`, through the lists.

    dout, out: like q; lse `[b, h, s]`: out and lse over all keys the queries see, not only these.
    The rest as in `sparse_fwd`. Result in the wider of fp32 and q.dtype; the same bits every time.
    """
    shape, nheads_kv = q.shape, lists.ids.shape[1]
    dout, q, out = (fold(x, nheads_kv) for x in (dout, q, out))
    delta = (dout * out).sum(-1)
    lse = lse.reshape(delta.shape)
    # The buffer of `out` is free now: it takes dq.
    dq, dtable = out.zero_(), torch.zeros(table.shape, dtype=q.dtype, device=q.device)
    steps = _Steps(q, table, lists, rows)
    scratch = q.new_empty(3, steps.scores)
    for tile in steps.tiles():
        grads = GateGrads(
            steps.rows_of(tile, dout),
            steps.rows_of(tile, q) * softmax_scale,
            steps.rows_of(tile, lse[..., None]),
            steps.rows_of(tile, delta[..., None]),
        )
        for ids, hidden in steps.blocks(tile):
            keys = steps.take(ids)
            dkeys = (torch.zeros_like(keys[0]), torch.zeros_like(keys[1]))
            grads.add(keys, dkeys, hidden, rows.block_size, scratch)
            for i, part in enumerate(dkeys):
                _add_rows(dtable.view(-1, *table.shape[2:]), 2 * ids + i, part)
        steps.put(tile, dq, grads.dq)
    return unfold(dq.mul_(softmax_scale), shape), dtable


class _Steps:
    """How rows and lists are cut into tiles, and what a tile takes from the table."""

    def __init__(self, q: Tensor, table: Tensor, lists: BlockLists, rows: QueryRows) -> None:
        self.num_heads, self.group = q.shape[:2]
        self.table, self.rows, self.wide = table.reshape(-1, *table.shape[2:]), rows, q.dtype
        self.ids, self.lists = lists.by_head, lists
        self.blocks_at_once = min(max(1, BLOCK // rows.block_size), max(1, self.ids.shape[2]))
        self.keys = self.blocks_at_once * rows.block_size
        self.rows_at_once = max(1, BLOCK // self.group)

    @property
    def scores(self) -> int:
        """Scores that a tile has at most."""
        return max((x * self.group * r * self.keys for x, r in map(self._size, self._runs())))

    def _runs(self) -> list[int]:
        return self.lists.lengths.unique().tolist()

    def _size(self, length: int) -> tuple[int, int]:
        """Units (of whatever key head) at once, and rows of each."""
        rows = min(length, self.rows_at_once)
        room = SCORES_AT_ONCE // (self.group * rows * self.keys)
        room = min(room, KEYS_AT_ONCE // (self.keys * self.table.shape[2]))
        return max(1, min(room, self.num_heads * len(self.lists.lengths))), rows

    def tiles(self) -> Iterator[_Tile]:
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

    def rows_of(self, tile: _Tile, x: Tensor) -> Tensor:
        """[heads * units, g * rows, ...] of x [u, g, s, ...]: a copy."""
        return tile.of(x).transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def put(self, tile: _Tile, whole: Tensor, part: Tensor) -> None:
        """The other way round."""
        at = tile.of(whole).transpose(1, 2)
        at.copy_(part.view(at.shape))

    def blocks(self, tile: _Tile) -> Iterator[tuple[Tensor, Tensor]]:
        """Entries of the table [heads * units, k], some at a time, and from which rows they are
        hidden [heads * units, 1, rows, k]."""
        index = torch.arange(tile.start, tile.start + self._rows_in(tile))
        of_tile = index.view(-1, tile.length)[:, tile.rows]
        idx, lo = self.rows.idx[of_tile], self.rows.lo[of_tile]
        ids = self.ids[tile.heads, tile.units]
        for i in range(0, ids.shape[2], self.blocks_at_once):
            some = ids[:, :, None, i : i + self.blocks_at_once]
            hidden = _hidden(some, self.lists.numbers, QueryRows(idx, lo, self.rows.block_size))
            if not bool(hidden.all()):
                yield some.flatten(0, 2).clamp(min=0).long(), hidden.flatten(0, 1)[:, None]

    @staticmethod
    def _rows_in(tile: _Tile) -> int:
        return (tile.units.stop - tile.units.start) * tile.length

    def take(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [heads * units, k * L, d]."""
        k, v = (self.table.index_select(0, 2 * ids.flatten() + i).to(self.wide) for i in (0, 1))
        shape = (len(ids), -1, k.shape[2])
        return k.view(shape), v.view(shape)


def _hidden(ids: Tensor, numbers: Tensor, rows: QueryRows) -> Tensor:
    """ids: [..., s or 1, K]; rows: [..., s]; hidden [..., s, K]."""
    if not len(numbers):
        return torch.ones_like(ids, dtype=torch.bool)
    begins = numbers[ids.clamp(min=0).long()] * rows.block_size
    return (ids < 0) | (begins > rows.past[0].to(ids.device)[..., None])


def _add_rows(table: Tensor, ids: Tensor, rows: Tensor) -> None:
    """Of the operators that add, index_add_ does so in order on a CPU, index_put_ on CUDA."""
    rows = rows.view(-1, *table.shape[1:])
    if rows.is_cuda:
        table.index_put_((ids.flatten(),), rows, accumulate=True)
    else:
        table.index_add_(0, ids.flatten(), rows)

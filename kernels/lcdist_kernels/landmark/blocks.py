"""The grid of landmark attention: blocks of L tokens, the last of which is the block's landmark.

Blocks are counted from the beginning of every document (arXiv:2305.16300). Everything below this
file reckons with slots: token numbers of a sequence in which every document begins at a multiple
of L, so that slot s lies in block s // L and is a landmark where s % L == L - 1. Where documents
begin so of themselves, slots are the tokens' own numbers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import document_starts


class QueryRows(NamedTuple):
    """Queries by slot. idx `[s]`; lo `[s]`: the first slot of their document; int64 on the CPU."""

    idx: Tensor
    lo: Tensor
    block_size: int

    @property
    def own(self) -> Tensor:
        """The first slot of each query's own block."""
        return self.idx // self.block_size * self.block_size

    @property
    def content(self) -> tuple[Tensor, Tensor]:
        """(last, first) slot that each query sees of its own block: never the landmark."""
        return self.idx - (self.idx % self.block_size == self.block_size - 1).long(), self.own

    @property
    def past(self) -> tuple[Tensor, Tensor]:
        """(last, first) slot at which a block that each query may look back at begins."""
        return self.own - 1, self.lo

    def part(self, start: int, stop: int) -> "QueryRows":
        """Queries start to stop."""
        return QueryRows(self.idx[start:stop], self.lo[start:stop], self.block_size)


class BlockGrid(NamedTuple):
    """A whole sequence on its grid. rows: all its tokens; num_slots: blocks times block_size."""

    rows: QueryRows
    num_slots: int

    def to_slots(self, x: Tensor) -> Tensor:
        """x `[b, s, h, d]` by slot, `[b, num_slots, h, d]`; zero where there is no token."""
        slots = self.rows.idx
        if len(slots) == 0 or int(slots[-1]) == len(slots) - 1:
            return F.pad(x, (0, 0, 0, 0, 0, self.num_slots - len(slots)))
        out = x.new_zeros(x.shape[0], self.num_slots, *x.shape[2:])
        return out.index_copy(1, slots.to(x.device), x)


def block_grid(cu_seqlens: Tensor | None, seqlen: int, block_size: int) -> BlockGrid:
    """The grid of a sequence with documents of any length. cu_seqlens: see `document_starts`."""
    index = torch.arange(seqlen)
    starts = document_starts(cu_seqlens, index, seqlen)
    lengths = torch.unique_consecutive(starts, return_counts=True)[1]
    room = -(-lengths // block_size) * block_size
    begins = room.cumsum(0) - room
    lo = begins.repeat_interleave(lengths)
    return BlockGrid(QueryRows(lo + index - starts, lo, block_size), int(room.sum()))


def block_starts(num_slots: int, block_size: int) -> Tensor:
    """The first slots of all blocks of a grid."""
    return torch.arange(0, num_slots, block_size)


def slots_of(k_start: Tensor, block_size: int) -> Tensor:
    """The slots of blocks that begin at `k_start`, one block after the other."""
    return (k_start[:, None] + torch.arange(block_size)).flatten()


def landmarks(k: Tensor, block_size: int) -> Tensor:
    """The keys of the landmarks `[b, n, h_kv, d]` among those of n whole blocks."""
    return k[:, block_size - 1 :: block_size]


class Run(NamedTuple):
    """Neighbouring selection units of one length. start: row; first: unit; count; length: rows."""

    start: int
    first: int
    count: int
    length: int


def unit_lengths(index: Tensor, starts: Tensor, select_tokens: int) -> Tensor:
    """How many rows each selection unit has: select_tokens tokens, fewer at a document's border.

    index: numbers of consecutive tokens of the whole sequence; starts: the first token of each
    one's document. Units are counted from the beginning of the whole sequence, so a border inside
    one makes two units of it.
    """
    of = torch.stack((index // select_tokens, starts))
    return torch.unique_consecutive(of, dim=1, return_counts=True)[1]


def runs_of(lengths: Tensor) -> Iterator[Run]:
    """Units grouped where neighbours have one length."""
    start = first = 0
    values, counts = torch.unique_consecutive(lengths, return_counts=True)
    for length, count in zip(values.tolist(), counts.tolist(), strict=True):
        yield Run(start, first, count, length)
        start, first = start + length * count, first + count

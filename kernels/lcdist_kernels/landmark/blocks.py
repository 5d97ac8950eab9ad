"""Block grid of landmark attention: blocks of L tokens; the last token is the landmark.

Blocks count from the start of every document (arXiv:2305.16300). The code below works with slots:
token numbers in a padded sequence where every document starts at a multiple of L. So slot s is in
block s // L and is a landmark where s % L == L - 1. Where documents already start at multiples of
L, slots equal token numbers.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.common import document_starts


class QueryRows(NamedTuple):
    """Queries by slot.

    idx `[s]`: their slots. lo `[s]`: the first slot of their documents. Both int64 on the CPU.
    """

    idx: Tensor
    lo: Tensor
    block_size: int

    @property
    def own(self) -> Tensor:
        """Return the first slot of each query's own block."""
        return self.idx // self.block_size * self.block_size

    @property
    def content(self) -> tuple[Tensor, Tensor]:
        """Return the (last, first) slot each query sees of its own block, without the landmark."""
        return self.idx - (self.idx % self.block_size == self.block_size - 1).long(), self.own

    @property
    def past(self) -> tuple[Tensor, Tensor]:
        """Return the (last, first) slot at which a past block of each query may begin."""
        return self.own - 1, self.lo

    def part(self, start: int, stop: int) -> "QueryRows":
        """Return queries start to stop."""
        return QueryRows(self.idx[start:stop], self.lo[start:stop], self.block_size)


class BlockGrid(NamedTuple):
    """A whole sequence by slot.

    rows: all tokens. num_slots: number of blocks times block_size. gaps: whether slots between
    tokens are empty, not only those after the last.
    """

    rows: QueryRows
    num_slots: int
    gaps: bool

    def to_slots(self, x: Tensor) -> Tensor:
        """Return x `[b, s, h, d]` by slot, `[b, num_slots, h, d]`; zero in empty slots.

        Without empty slots it is x itself.
        """
        slots = self.rows.idx
        if not self.gaps:
            if self.num_slots == len(slots):
                return x
            return F.pad(x, (0, 0, 0, 0, 0, self.num_slots - len(slots)))
        out = x.new_zeros(x.shape[0], self.num_slots, *x.shape[2:])
        return out.index_copy(1, slots.to(x.device), x)


def block_grid(cu_seqlens: Tensor | None, seqlen: int, block_size: int) -> BlockGrid:
    """Return the grid of a sequence with documents of any length; see `document_starts`."""
    index = torch.arange(seqlen)
    starts = document_starts(cu_seqlens, index, seqlen)
    lengths = torch.unique_consecutive(starts, return_counts=True)[1]
    padded = -(-lengths // block_size) * block_size
    begins = padded.cumsum(0) - padded
    lo = begins.repeat_interleave(lengths)
    slots = lo + index - starts
    gaps = seqlen > 0 and int(slots[-1]) >= seqlen
    return BlockGrid(QueryRows(slots, lo, block_size), int(padded.sum()), gaps)


def block_starts(num_slots: int, block_size: int) -> Tensor:
    """Return the first slots of all blocks of a grid."""
    return torch.arange(0, num_slots, block_size)


def slots_of(k_start: Tensor, block_size: int) -> Tensor:
    """Return the slots of the blocks that begin at `k_start`, block after block."""
    return (k_start[:, None] + torch.arange(block_size)).flatten()


def landmarks(k: Tensor, block_size: int) -> Tensor:
    """Return the landmarks' keys `[b, n, h_kv, d]` of n whole blocks of keys."""
    return k[:, block_size - 1 :: block_size]


class Run(NamedTuple):
    """Consecutive selection units of one length. start: row; first: unit; length: in rows."""

    start: int
    first: int
    count: int
    length: int


def unit_lengths(index: Tensor, starts: Tensor, select_tokens: int) -> Tensor:
    """Return the number of rows of each selection unit.

    A unit has select_tokens tokens, or fewer at a document border. Units count from the start of
    the whole sequence, so a border inside a unit splits it.

    Args:
        index: numbers of consecutive tokens of the whole sequence.
        starts: the first token of each token's document.
    """
    units = torch.stack((index // select_tokens, starts))
    return torch.unique_consecutive(units, dim=1, return_counts=True)[1]


def runs_of(lengths: Tensor) -> Iterator[Run]:
    """Yield runs of consecutive units with one length."""
    start = first = 0
    values, counts = torch.unique_consecutive(lengths, return_counts=True)
    for length, count in zip(values.tolist(), counts.tolist(), strict=True):
        yield Run(start, first, count, length)
        start, first = start + length * count, first + count

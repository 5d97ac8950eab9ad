"""Lists of short selection units: united for chunks of rows, and inverted to the rows of a block.

A unit of few tokens fills no tile. Neighbouring rows read mostly the same blocks, so a chunk of
rows walks the union of their lists, and a bit of each row and block says whether the row reads it.
Blocks that only neighbours read have weight 0; where several blocks share a tile of keys, they may
change the order in which a row's own are summed, and so its last bits.

A chunk walks one list with a whole tile, or two of its halves with half a tile each. Which is less
work is in the choice, which only the device knows: both are launched, and the programs of a chunk
read the lengths of its lists and end at once if it is the other's. So nothing waits, and the same
inputs give the same bits. A gather for each token would be chunks of one row; a tile has 16 rows at
least, so a chunk of 16 over the group's heads reads no more.

Backward, the keys of a block need no union: their program gathers the rows that read the block,
from lists that are inverted by a counting sort.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lcdist_kernels.landmark.union_kernel import _count_kernel, _place_kernel, _union_kernel
from lcdist_kernels.landmark.unit_tables import on_device, units_of
from lcdist_kernels.tile_ranges import TABLES_KEPT, device_stream
from lcdist_kernels.triton_common import launch_context

# Most rows of a chunk: the bits of an int32.
CHUNK = 32
# Rows of a tile of queries, tokens times heads of a group.
TILE = 128
AT_ONCE = 256
# Programs that unite the chunks of a key head, each with scratch for all blocks.
PROGRAMS = 256
# Rows of a segment of the counting sort, and its greatest number of counts: 256 MiB.
SEGMENT = 256
MOST_COUNTS = 1 << 26


class Union(NamedTuple):
    """Lists of chunks of rows and of their halves; what is behind a list's end is undefined.

    Attributes:
        lists, members: int32 `[b, h_kv, chunks, W]`, blocks that any row of a chunk reads,
            increasing; bit r of a member says whether row r reads the block.
        half_lists, half_members: the same of halves, `[b, h_kv, 2 chunks, W']`.
        sizes: int32 `[b, h_kv, chunks, 3]`, blocks in the lists of a chunk and of its halves.
    """

    lists: Tensor
    members: Tensor
    half_lists: Tensor
    half_members: Tensor
    sizes: Tensor


def chunk_of(group: int) -> int:
    """Return the rows of a chunk that fills a tile with `group` heads; at least two."""
    return max(2, min(CHUNK, TILE // triton.next_power_of_2(group)))


@lru_cache(maxsize=TABLES_KEPT)
def chunk_lengths(seqlen: int, chunk: int) -> Tensor:
    """Return the number of rows of each chunk: int64 on the CPU."""
    starts = torch.arange(0, seqlen, chunk)
    return (seqlen - starts).clamp(max=chunk)


def unite(chosen: Tensor, lengths: Tensor, num_blocks: int, seqlen: int, chunk: int) -> Union:
    """Return the lists of chunks of rows and of their halves.

    Args:
        chosen: int32 `[b, h_kv, units, K]`, contiguous; -1: none.
        lengths: rows of each unit, int64 on the CPU; of a plan.
        chunk: rows of a chunk, a power of two from 2 to `CHUNK`.
    """
    batch, heads, units, num_ids = chosen.shape
    chunks, programs = triton.cdiv(seqlen, chunk), min(triton.cdiv(seqlen, chunk), PROGRAMS)
    width, half_width = (min(num_blocks, rows * num_ids) for rows in (chunk, chunk // 2))
    whole, halves = (chunks, width), (2 * chunks, half_width)
    scratch, *made = (
        torch.empty((batch, heads, *size), dtype=torch.int32, device=chosen.device)
        for size in ((programs, num_blocks), whole, whole, halves, halves, (chunks, 3))
    )
    unit_of = on_device(units_of(lengths).of_row, device_stream(chosen))
    with launch_context(chosen):
        _union_kernel[(programs, heads, batch)](
            chosen, unit_of, scratch, *made, seqlen, chunks, units, num_ids, num_blocks, width,
            half_width, CHUNK=chunk, BLOCK_K=triton.next_power_of_2(num_ids), BLOCK_N=AT_ONCE,
            num_warps=4,
        )  # fmt: skip
    return Union(*made)


def invert(
    chosen: Tensor, lengths: Tensor, num_blocks: int, seqlen: int, segment: int = SEGMENT
) -> tuple[Tensor, Tensor]:
    """Return the rows that read each block, and where they start.

    Args:
        chosen, lengths: as of `unite`.
        segment: the least number of rows of a segment; another gives the same rows.

    Returns:
        readers: int32 `[b, h_kv, s K]`, the rows of block after block, each block's increasing.
        starts: int32 `[b, h_kv, n + 1, segments]`; those of a block begin at its first number and
            end before the next block's.
    """
    batch, heads, units, num_ids = chosen.shape
    while batch * heads * (num_blocks + 1) * triton.cdiv(seqlen, segment) > MOST_COUNTS:
        segment *= 2
    segments = triton.cdiv(seqlen, segment)
    counts, readers = (
        torch.empty((batch, heads, *size), dtype=torch.int32, device=chosen.device)
        for size in ((num_blocks + 1, segments), (seqlen * num_ids,))
    )
    unit_of = on_device(units_of(lengths).of_row, device_stream(chosen))
    sizes = seqlen, units, num_ids, num_blocks, segment
    grid, block_k = (segments, heads, batch), triton.next_power_of_2(num_ids)
    with launch_context(chosen):
        _count_kernel[grid](
            chosen, unit_of, counts, *sizes, ROWS=32, BLOCK_K=block_k, BLOCK_N=AT_ONCE, num_warps=4
        )
    starts = counts.flatten(2).cumsum(2, dtype=torch.int32).view(counts.shape)
    with launch_context(chosen):
        _place_kernel[grid](
            chosen, unit_of, starts, readers, *sizes, BLOCK_K=block_k, num_warps=1, num_stages=1
        )
    return readers, starts

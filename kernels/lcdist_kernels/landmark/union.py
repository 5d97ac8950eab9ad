"""Lists of short selection units as lists of chunks of rows, each the union of its rows' lists.

A unit of few tokens fills no tile. Neighbouring rows read mostly the same blocks, so a chunk of 32
rows walks the union of their lists, and a bit of each row and block says whether the row reads it.
Blocks that only neighbours read have weight 0; where several blocks share a tile of keys, they may
change the order in which a row's own are summed, and so its last bits.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from functools import lru_cache

import torch
import triton
from torch import Tensor

from lcdist_kernels.landmark.union_kernel import _invert_kernel, _union_kernel
from lcdist_kernels.landmark.unit_tables import on_device, units_of
from lcdist_kernels.tile_ranges import TABLES_KEPT, device_stream
from lcdist_kernels.triton_common import launch_context

# Rows of a chunk: the bits of an int32.
CHUNK = 32
AT_ONCE = 256


@lru_cache(maxsize=TABLES_KEPT)
def chunk_lengths(seqlen: int) -> Tensor:
    """Return the number of rows of each chunk: int64 on the CPU."""
    starts = torch.arange(0, seqlen, CHUNK)
    return (seqlen - starts).clamp(max=CHUNK)


def unite(chosen: Tensor, lengths: Tensor, num_blocks: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """Return (lists, members) int32 `[b, h_kv, chunks, n]` of the blocks that units chose.

    Args:
        chosen: int32 `[b, h_kv, units, K]`, contiguous; -1: none.
        lengths: rows of each unit, int64 on the CPU; of a plan.
    """
    batch, heads, units, width = chosen.shape
    shape = (batch, heads, triton.cdiv(seqlen, CHUNK), num_blocks)
    members, lists = (torch.empty(shape, dtype=torch.int32, device=chosen.device) for _ in range(2))
    unit_of = on_device(units_of(lengths).of_row, device_stream(chosen))
    with launch_context(chosen):
        _union_kernel[(shape[2], heads, batch)](
            chosen, unit_of, members, lists, seqlen, units, width, num_blocks, CHUNK=CHUNK,
            BLOCK_K=triton.next_power_of_2(width), BLOCK_N=AT_ONCE, num_warps=4,
        )  # fmt: skip
    return lists, members


def invert(members: Tensor) -> Tensor:
    """Return the chunks that read each block: int32 `[b, h_kv, n, chunks]`, -1 at the end."""
    batch, heads, chunks, blocks = members.shape
    readers = torch.empty((batch, heads, blocks, chunks), dtype=torch.int32, device=members.device)
    with launch_context(members):
        _invert_kernel[(blocks, heads, batch)](
            members, readers, chunks, blocks, BLOCK_M=AT_ONCE, num_warps=4
        )  # fmt: skip
    return readers

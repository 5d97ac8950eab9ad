"""Prepare launches over lists of blocks: rows, lists, tiles and the kernels' constants."""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lcdist_kernels.descriptors import make_descriptors, use_descriptors
from lcdist_kernels.landmark.blocks import QueryRows
from lcdist_kernels.landmark.inner_loop import Tiling, launch_for, tiling_of
from lcdist_kernels.landmark.sparse import BlockLists
from lcdist_kernels.landmark.tile_configs import BlockTables
from lcdist_kernels.landmark.union import chunk_lengths, chunk_of, unite
from lcdist_kernels.landmark.unit_tables import (
    numbers_by_head,
    on_device,
    unit_tiles,
    units_of,
)
from lcdist_kernels.tile_ranges import device_stream
from lcdist_kernels.triton_common import Launch, choose_key, is_hopper, padded


class Part(NamedTuple):
    """Chunks of rows, or their halves, that short units are united to; see `union`.

    Attributes:
        members: int32 like the lists. sizes: int32 `[b, h_kv, chunks, 3]`.
        rows: of a chunk or a half.
        parts: 1 for chunks, 2 for halves.
    """

    members: Tensor
    sizes: Tensor
    rows: int
    parts: int


class Work(NamedTuple):
    """Rows and lists of a launch.

    Attributes:
        ids: int32 `[b, h_kv, units, K]`, contiguous. lengths: rows of each unit.
        begins: first slots of a table's entries, int32; None: entries are blocks of k and v, and
            rows also see their own.
        part: what the units are if they were made of shorter ones.
    """

    ids: Tensor
    lengths: Tensor
    rows: QueryRows
    begins: Tensor | None
    part: Part | None = None

    def short(self, q: Tensor) -> bool:
        """Return whether units are shorter than a chunk of rows, and entries are blocks."""
        chunk = chunk_of(q.shape[2] // self.ids.shape[1])
        return self.begins is None and units_of(self.lengths).longest < chunk

    def united(self, q: Tensor, k: Tensor) -> "list[Work]":
        """Return the work of each launch of a kernel whose programs walk lists.

        Short units are united, once to chunks and once to halves of chunks.
        """
        if not self.short(q):
            return [self]
        seqlen, blocks = q.shape[1], k.shape[1] // self.rows.block_size
        chunk = chunk_of(q.shape[2] // self.ids.shape[1])
        found = unite(self.ids, self.lengths, blocks, seqlen, chunk)
        lists = (found.lists, found.members), (found.half_lists, found.half_members)
        return [
            Work(
                ids, chunk_lengths(seqlen, chunk // parts), self.rows, None,
                Part(members, found.sizes, chunk // parts, parts),
            )
            for parts, (ids, members) in enumerate(lists, 1)
        ]  # fmt: skip

    def keys(
        self, tables: BlockTables, launch: Launch | None, q: Tensor, k: Any, v: Any
    ) -> tuple[Launch, Any, Any, bool]:
        """Return (launch, k, v, whether these are descriptors) for a kernel that walks lists.

        A descriptor's box is an entry. Only where two share a tile of 128 keys do descriptors pay,
        so other head_dims than the table's come by pointers. launch: None for that of `tables`.
        """
        size = self.rows.block_size
        whole = (k, v) if self.begins is None else (k[:, :, None], v[:, :, None])
        if choose_key(tables.small, q) in tables.described and use_descriptors(*whole):
            chosen = launch or launch_for(tables, q, size, described=True)
            if chosen.block_n == 2 * size >= 32:
                k, v = make_descriptors(size, *whole)
                return chosen, k, v, True
        return launch or launch_for(tables, q, size), k, v, False

    def row_launch(self, launch: Launch, q: Tensor) -> Launch:
        """Return the launch with at most the rows of the longest unit, but all heads of a group.

        On Hopper a cut tile keeps 16 rows a warp.
        """
        group = q.shape[2] // self.ids.shape[1]
        longest = triton.next_power_of_2(units_of(self.lengths).longest * group)
        block_m = max(16, triton.next_power_of_2(group), min(launch.block_m, longest))
        if block_m < launch.block_m and is_hopper(q):
            launch = launch._replace(num_warps=min(launch.num_warps, max(4, block_m // 16)))
        return launch._replace(block_m=block_m)

    def tiles(self, launch: Launch, q: Tensor) -> Tensor:
        """Return (unit, first row, number of rows) of every tile of queries: int32 `[n, 3]`."""
        tokens = launch.block_m * self.ids.shape[1] // q.shape[2]
        return unit_tiles(self.lengths, tokens, device_stream(q))

    def slots(self, q: Tensor) -> Tensor:
        """Return the slot of each row, int32 on the device."""
        return on_device(self.rows.idx, device_stream(q))

    def entry_strides(self, *tensors: Tensor) -> list[int]:
        """Return the batch, entry, token and head strides of each tensor."""
        found = []
        for x in tensors:
            if self.begins is None:
                batch, token, head = x.stride()[:3]
                found += [batch, self.rows.block_size * token, token, head]
            else:
                found += [0, *x.stride()[:2], 0]
        return found

    def list_constants(self, q: Tensor, launch: Launch) -> dict[str, int]:
        """Return the constants of a kernel whose programs walk lists."""
        rows, parts = (0, 1) if self.part is None else self.part[2:]
        block_k = triton.next_power_of_2(self.ids.shape[3])
        return self.constants(q, launch) | {"BLOCK_K": block_k, "CHUNK": rows, "PARTS": parts}

    def list_tables(self, q: Tensor, k: Tensor) -> list[Tensor]:
        """Return ids, members, sizes, slots, begins and slots of k; kernels read what they need."""
        slots = self.slots(q)
        members, sizes = (slots, slots) if self.part is None else self.part[:2]
        begins = self.begins
        k_slots = slots if begins is not None else numbers_by_head(1, k.shape[1], device_stream(q))
        return [self.ids, members, sizes, slots, slots if begins is None else begins, k_slots]

    def constants(self, q: Tensor, launch: Launch) -> dict[str, int]:
        """Return the constants of a launch."""
        return {
            "GROUP": q.shape[2] // self.ids.shape[1],
            "HEAD_DIM": q.shape[3],
            "BLOCK_D": padded(q.shape[3]),
            "LOCAL": self.begins is None,
            **tiling_of(self.rows.block_size, launch.block_n).constants(),
            **launch.options(),
        }


def table_work(lists: BlockLists, rows: QueryRows) -> Work:
    """Return the work over lists of a table's entries."""
    begins = (lists.numbers * rows.block_size).to(lists.ids.device, torch.int32)
    return Work(lists.ids.contiguous(), lists.lengths, rows, begins)


def one_entry(launch: Launch, size: int) -> dict[str, int]:
    """Return the constants for a tile of keys that is one entry or a part of one."""
    block_n = max(16, min(launch.block_n, triton.next_power_of_2(size)))
    steps = triton.cdiv(size, block_n)
    return {"BLOCK_N": block_n, **Tiling(size, 1, block_n, steps).constants()}


def sorted_readers(ids: Tensor, entries: int, local: bool) -> tuple[Tensor, Tensor]:
    """Return the inverse of the lists: places sorted by entry, and each entry's first.

    local: by batch row and key head, as these have entries of their own.
    """
    flat = ids.flatten(0, 1).flatten(1) if local else ids.flatten()[None]
    in_order, readers = flat.sort(dim=1, stable=True)
    numbers = numbers_by_head(len(flat), entries + 1, device_stream(ids))
    return readers, torch.searchsorted(in_order, numbers)

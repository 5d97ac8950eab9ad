"""Launches of landmark attention's kernels over lists: tiles of units, and inverse lists."""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lcdist_kernels.landmark.blocks import QueryRows
from lcdist_kernels.landmark.inner_loop import Tiling, launch_for, tiling_of
from lcdist_kernels.landmark.sparse import BlockLists
from lcdist_kernels.landmark.sparse_kernel import (
    _sparse_bwd_dkv_kernel,
    _sparse_bwd_dq_kernel,
    _sparse_fwd_kernel,
)
from lcdist_kernels.landmark.tile_configs import (
    BWD_DKV_TABLES,
    BWD_DQ_TABLES,
    FWD_TABLES,
)
from lcdist_kernels.landmark.union import CHUNK, chunk_lengths, invert, unite
from lcdist_kernels.landmark.unit_tables import (
    block_rows,
    numbers_by_head,
    on_device,
    unit_rows,
    unit_tiles,
    units_of,
)
from lcdist_kernels.tile_ranges import device_stream
from lcdist_kernels.triton_common import (
    LOG2E,
    Launch,
    check_kernel,
    is_hopper,
    last_dim_contiguous,
    launch_context,
    padded,
    strides,
)


class _Work(NamedTuple):
    """Rows and lists of a launch.

    ids: int32 `[b, h_kv, units, K]`, contiguous. lengths: rows of each unit. begins: first slots of
    a table's entries, int32; None: entries are blocks of k and v, and rows also see their own.
    members: which rows of a unit read its list's blocks, see `union`; None: all. chosen: the lists
    and lengths of the units that were united, if they were.
    """

    ids: Tensor
    lengths: Tensor
    rows: QueryRows
    begins: Tensor | None
    members: Tensor | None = None
    chosen: tuple[Tensor, Tensor] | None = None

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

    def walk_constants(self, q: Tensor, launch: Launch) -> dict[str, int]:
        """Return the constants of a kernel whose programs walk lists."""
        block_k, union = triton.next_power_of_2(self.ids.shape[3]), self.members is not None
        return self.constants(q, launch) | {"BLOCK_K": block_k, "UNION": union}

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


def sparse_fwd(
    q: Tensor,
    table: Tensor,
    lists: BlockLists,
    query_rows: QueryRows,
    softmax_scale: float,
    *,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the partial (out `[b, s, h, d]`, lse `[b, h, s]`) of q over its units' lists.

    Like the tiled `sparse_fwd`, for bf16, fp16 and fp32, head_dim even and from 16 to 256. The
    table has q's dtype or a wider one; the partial is fp32. Raises as `check_kernel`.
    """
    work, (k, v) = _table_work(lists, query_rows), _table_sides(q, table)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    if not q.numel() or not lists.ids.numel() or not len(table):
        return out.zero_(), _new_lse(q).fill_(-torch.inf)
    return out, _forward(q, k, v, out, work, softmax_scale, launch)


def sparse_bwd(
    dout: Tensor, q: Tensor, table: Tensor, out: Tensor, lse: Tensor, lists: BlockLists,
    query_rows: QueryRows, softmax_scale: float, *,
    launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the share of dq, and dtable `[m, 2, L, d]`, through the lists, both fp32.

    Like the tiled `sparse_bwd`: out and lse are over all keys that the queries see. launches: tiles
    for dq and for dtable. Raises as `check_kernel`.
    """
    work, (k, v) = _table_work(lists, query_rows), _table_sides(q, table)
    dq, dtable = (torch.empty(x.shape, dtype=torch.float32, device=q.device) for x in (q, table))
    if not q.numel() or not lists.ids.numel() or not len(table):
        return dq.zero_(), dtable.zero_()
    grads = (dq, *dtable.unbind(1))
    _backward(dout, q, k, v, out, lse, grads, work, softmax_scale, launches)
    return dq, dtable


def local_fwd(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, lengths: Tensor, rows: QueryRows,
    softmax_scale: float, *,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (out, lse) over own and chosen blocks, like the tiled `local_fwd`, in one kernel.

    Raises as `check_kernel`.
    """
    check_kernel(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not q.numel():
        return out, _new_lse(q)
    work = _local_work(q, k, chosen, lengths, rows)
    k, v = last_dim_contiguous(k), last_dim_contiguous(v)
    return out, _forward(q, k, v, out, work, softmax_scale, launch)


def local_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, chosen: Tensor,
    lengths: Tensor, rows: QueryRows, softmax_scale: float, *,
    launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dq, dk, dv), like the tiled `local_bwd`, in two kernels.

    launches: tiles for dq and for dk, dv. Raises as `check_kernel`.
    """
    check_kernel(q)
    dq, dk, dv = (torch.empty(x.shape, dtype=q.dtype, device=q.device) for x in (q, k, v))
    if q.numel():
        work = _local_work(q, k, chosen, lengths, rows)
        k, v = last_dim_contiguous(k), last_dim_contiguous(v)
        _backward(dout, q, k, v, out, lse, (dq, dk, dv), work, softmax_scale, launches)
    return dq, dk, dv


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, work: _Work, softmax_scale: float,
    launch: Launch | None,
) -> Tensor:  # fmt: skip
    """Fill out and return lse."""
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale
    q, lse, ids = last_dim_contiguous(q), _new_lse(q), work.ids
    launch = launch or launch_for(FWD_TABLES, q, work.rows.block_size)
    launch = work.row_launch(launch, q)
    tiles, slots = work.tiles(launch, q), work.slots(q)
    begins, k_idx = _places(q, k, work)
    members = slots if work.members is None else work.members
    with launch_context(q):
        _sparse_fwd_kernel[(len(tiles), ids.shape[1], len(q))](
            q, k, v, out, lse, ids, members, slots, begins, k_idx, tiles,
            softmax_scale * LOG2E.value, q.shape[1], k.shape[1], *ids.shape[2:], *strides(q),
            *work.entry_strides(k, v), *strides(out), **work.walk_constants(q, launch),
        )  # fmt: skip
    return lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, ...], work: _Work, softmax_scale: float,
    launches: tuple[Launch, Launch] | None,
) -> None:  # fmt: skip
    """Fill grads (dq, dk, dv)."""
    if softmax_scale < 0:
        _backward(dout, -q, k, v, out, lse, grads, work, -softmax_scale, launches)
        grads[0].neg_()
        return
    q, out, dout = (last_dim_contiguous(x) for x in (q, out, dout.to(q.dtype)))
    (dq, dk, dv), ids, size = grads, work.ids, work.rows.block_size
    for_dq, for_dkv = launches or (
        launch_for(BWD_DQ_TABLES, q, size),
        launch_for(BWD_DKV_TABLES, q, size),
    )
    for_dq = work.row_launch(for_dq, q)
    if work.chosen is None:
        for_dkv = work.row_launch(for_dkv, q)
    tiles, slots, place = work.tiles(for_dq, q), work.slots(q), device_stream(q)
    begins, k_idx = _places(q, k, work)
    members = slots if work.members is None else work.members
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    local, inputs = work.begins is None, work.entry_strides(k, v)
    entries = k.shape[1] // size if local else len(k)
    own_rows = block_rows(work.rows.idx, size, entries, place) if local else begins
    constants = work.constants(q, for_dkv) | _one_entry(for_dkv, size)
    if work.chosen is None:
        named, segments, (readers, starts) = ids, 1, _sorted_readers(ids, entries, local)
    else:
        named = work.chosen[0]
        readers, starts = invert(*work.chosen, entries, q.shape[1])
        segments = starts.shape[3]
    with launch_context(q):
        _sparse_bwd_dq_kernel[(len(tiles), ids.shape[1], len(q))](
            q, k, v, out, dout, lse, delta, dq, ids, members, slots, begins, k_idx, tiles,
            float(softmax_scale), q.shape[1], k.shape[1], *ids.shape[2:], *strides(q), *inputs,
            *strides(out, dout, dq), **work.walk_constants(q, for_dq),
        )  # fmt: skip
        grid = (entries * constants["STEPS"], ids.shape[1] if local else 1, len(q) if local else 1)
        _sparse_bwd_dkv_kernel[grid](
            q, k, v, dout, lse, delta, dk, dv, readers, starts,
            unit_rows(work.lengths, place), slots, begins, own_rows, float(softmax_scale),
            q.shape[1], entries, *named.shape[2:], segments, ids.shape[1], *strides(q), *inputs,
            *strides(dout), *work.entry_strides(dk, dv), GATHER=work.chosen is not None,
            **constants,
        )  # fmt: skip


def _new_lse(q: Tensor) -> Tensor:
    """Return an empty lse `[b, h, s]` of q."""
    return torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)


def _local_work(q: Tensor, k: Tensor, chosen: Tensor, lengths: Tensor, rows: QueryRows) -> _Work:
    """Return the work over chosen blocks of k; short units are united to chunks of rows."""
    chosen, seqlen = chosen.contiguous(), q.shape[1]
    if units_of(lengths).longest >= CHUNK:
        return _Work(chosen, lengths, rows, None)
    lists, members = unite(chosen, lengths, k.shape[1] // rows.block_size, seqlen)
    return _Work(lists, chunk_lengths(seqlen), rows, None, members, (chosen, lengths))


def _table_work(lists: BlockLists, rows: QueryRows) -> _Work:
    """Return the work over lists of a table's entries."""
    begins = (lists.numbers * rows.block_size).to(lists.ids.device, torch.int32)
    return _Work(lists.ids.contiguous(), lists.lengths, rows, begins)


def _table_sides(q: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values `[m, L, d]` of the table in the dtype and layout that kernels take."""
    check_kernel(q)
    assert table.dim() == 4 and table.shape[1] == 2 and table.shape[3] == q.shape[3]
    assert table.device == q.device
    k, v = last_dim_contiguous(table.to(q.dtype)).unbind(1)
    return k, v


def _places(q: Tensor, k: Tensor, work: _Work) -> tuple[Tensor, Tensor]:
    """Return (begins, slots of k), int32 on the device; one of them is never read."""
    if work.begins is not None:
        return work.begins, work.begins
    slots = numbers_by_head(1, k.shape[1], device_stream(q))[0]
    return slots, slots


def _one_entry(launch: Launch, size: int) -> dict[str, int]:
    """Return the constants for a tile of keys that is one entry or a part of one."""
    block_n = max(16, min(launch.block_n, triton.next_power_of_2(size)))
    steps = triton.cdiv(size, block_n)
    return {"BLOCK_N": block_n, **Tiling(size, 1, block_n, steps).constants()}


def _sorted_readers(ids: Tensor, entries: int, local: bool) -> tuple[Tensor, Tensor]:
    """Return the inverse of the lists: places sorted by entry, and each entry's first.

    local: by batch row and key head, as these have entries of their own.
    """
    flat = ids.flatten(0, 1).flatten(1) if local else ids.flatten()[None]
    in_order, readers = flat.sort(dim=1, stable=True)
    numbers = numbers_by_head(len(flat), entries + 1, device_stream(ids))
    return readers, torch.searchsorted(in_order, numbers)

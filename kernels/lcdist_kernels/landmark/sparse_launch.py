"""Launches of landmark attention's kernels over lists: tiles of units, and inverse lists."""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
from torch import Tensor

from lcdist_kernels.landmark.blocks import QueryRows
from lcdist_kernels.landmark.inner_loop import Tiling, launch_for, tiling_of
from lcdist_kernels.landmark.sparse import BlockLists
from lcdist_kernels.landmark.sparse_kernel import (
    _sparse_bwd_dq_kernel,
    _sparse_bwd_dtable_kernel,
    _sparse_fwd_kernel,
)
from lcdist_kernels.landmark.tile_configs import (
    BWD_DKV,
    BWD_DKV_LARGE,
    BWD_DQ,
    BWD_DQ_LARGE,
    FWD,
    FWD_LARGE,
)
from lcdist_kernels.tile_ranges import Indices, device_stream, on_device
from lcdist_kernels.triton_common import (
    LOG2E,
    Launch,
    check_kernel,
    last_dim_contiguous,
    launch_context,
    padded,
    strides,
)


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
    table = _prepare_table(q, table)
    q = last_dim_contiguous(q)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=out.dtype, device=q.device)
    if not q.numel() or not lists.ids.numel() or not len(table):
        return out.zero_(), lse.fill_(-torch.inf)
    launch = _limit_rows(launch or launch_for(FWD, FWD_LARGE, q, query_rows.block_size), q, lists)
    tiles = _tiles(q, lists, launch)
    with launch_context(q):
        _sparse_fwd_kernel[(len(tiles), lists.ids.shape[1], len(q))](
            q, table, out, lse, *_list_tables(q, lists, query_rows), tiles,
            softmax_scale * LOG2E.value, q.shape[1], *lists.ids.shape[2:], *strides(q, table, out),
            **_constants(q, lists, query_rows.block_size, launch),
        )  # fmt: skip
    return out, lse


def sparse_bwd(
    dout: Tensor, q: Tensor, table: Tensor, out: Tensor, lse: Tensor, lists: BlockLists,
    query_rows: QueryRows, softmax_scale: float, *,
    launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the share of dq, and dtable `[m, 2, L, d]`, through the lists, both fp32.

    Like the tiled `sparse_bwd`: out and lse are over all keys that the queries see. launches: tiles
    for dq and for dtable. Raises as `check_kernel`.
    """
    table = _prepare_table(q, table)
    q, out, dout = (
        last_dim_contiguous(q),
        last_dim_contiguous(out),
        last_dim_contiguous(dout.to(q.dtype)),
    )
    size = query_rows.block_size
    dq, dtable = (torch.empty(x.shape, dtype=torch.float32, device=q.device) for x in (q, table))
    if not q.numel() or not lists.ids.numel() or not len(table):
        return dq.zero_(), dtable.zero_()
    for_dq, for_dtable = launches or (
        launch_for(BWD_DQ, BWD_DQ_LARGE, q, size),
        launch_for(BWD_DKV, BWD_DKV_LARGE, q, size),
    )
    for_dq, for_dtable = _limit_rows(for_dq, q, lists), _limit_rows(for_dtable, q, lists)
    tiles = _tiles(q, lists, for_dq)
    ids, stops, begins, q_last = _list_tables(q, lists, query_rows)
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    with launch_context(q):
        _sparse_bwd_dq_kernel[(len(tiles), ids.shape[1], len(q))](
            q, table, out, dout, lse, delta, dq, ids, stops, begins, q_last, tiles,
            float(softmax_scale), q.shape[1], *ids.shape[2:], *strides(q, table, out, dout, dq),
            **_constants(q, lists, size, for_dq),
        )  # fmt: skip
        constants = _constants(q, lists, size, for_dtable) | _one_entry(for_dtable, size)
        _sparse_bwd_dtable_kernel[(len(table) * constants["STEPS"],)](
            q, table, dout, lse, delta, dtable, *_readers(ids, len(table)),
            _table_on_device(q, _units(lists), 2), begins, q_last, float(softmax_scale), q.shape[1],
            *ids.shape[2:], ids.shape[1], *strides(q, table, dout), **constants,
        )  # fmt: skip
    return dq, dtable


def _prepare_table(q: Tensor, table: Tensor) -> Tensor:
    """Return the table in the dtype and layout that kernels take."""
    check_kernel(q)
    assert table.dim() == 4 and table.shape[1] == 2 and table.shape[3] == q.shape[3]
    assert table.device == q.device
    return last_dim_contiguous(table.to(q.dtype))


def _one_entry(launch: Launch, size: int) -> dict[str, int]:
    """Return the constants for a tile of keys that is one entry or a part of one."""
    block_n = max(16, min(launch.block_n, triton.next_power_of_2(size)))
    steps = triton.cdiv(size, block_n)
    return {"BLOCK_N": block_n, **Tiling(size, 1, block_n, steps).constants()}


def _limit_rows(launch: Launch, q: Tensor, lists: BlockLists) -> Launch:
    """Return the launch with at most the rows of the longest unit, but all heads of a group."""
    group = q.shape[2] // lists.ids.shape[1]
    longest = triton.next_power_of_2(int(lists.lengths.max()) * group)
    block_m = max(16, triton.next_power_of_2(group), min(launch.block_m, longest))
    return launch._replace(block_m=block_m)


def _constants(q: Tensor, lists: BlockLists, size: int, launch: Launch) -> dict[str, int]:
    """Return the constants of a launch."""
    return {
        "GROUP": q.shape[2] // lists.ids.shape[1],
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": padded(q.shape[3]),
        **tiling_of(size, launch.block_n).constants(),
        **launch.options(),
    }


def _list_tables(
    q: Tensor, lists: BlockLists, query_rows: QueryRows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (ids, entries of each list to visit, first slots of entries, last slots), int32."""
    ids = lists.ids.contiguous()
    place = torch.arange(1, ids.shape[3] + 1, dtype=torch.int32, device=q.device)
    stops = ((ids >= 0) * place).amax(3).to(torch.int32)
    begins = (lists.numbers * query_rows.block_size).to(q.device, torch.int32)
    return ids, stops, begins, on_device(Indices(query_rows.past[0]), device_stream(q))


def _units(lists: BlockLists) -> Tensor:
    """Return the first row and the number of rows of each unit: int64 `[n, 2]`."""
    return torch.stack((lists.lengths.cumsum(0) - lists.lengths, lists.lengths), 1)


def _tiles(q: Tensor, lists: BlockLists, launch: Launch) -> Tensor:
    """Return (unit, first row, number of rows) of every tile of queries: int32 `[n, 3]`."""
    tokens = launch.block_m * lists.ids.shape[1] // q.shape[2]
    starts, lengths = _units(lists).unbind(1)
    tiles_of = -(-lengths // tokens)
    unit = torch.arange(len(lengths)).repeat_interleave(tiles_of)
    before = (tiles_of.cumsum(0) - tiles_of)[unit]
    offset = (torch.arange(len(unit)) - before) * tokens
    count = (lengths[unit] - offset).clamp(max=tokens)
    return _table_on_device(q, torch.stack((unit, starts[unit] + offset, count), 1), 3)


def _table_on_device(q: Tensor, table: Tensor, width: int) -> Tensor:
    """Return a host table as int32 `[n, width]` on q's device."""
    return on_device(Indices(table.flatten()), device_stream(q)).view(-1, width)


def _readers(ids: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Return the inverse of the lists: positions in ids sorted by entry, and each entry's first."""
    in_order, readers = ids.flatten().sort(stable=True)
    starts = torch.searchsorted(in_order, torch.arange(entries + 1, device=ids.device))
    return readers, starts

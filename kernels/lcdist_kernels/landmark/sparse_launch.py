"""Launches of landmark attention's kernels over lists: tiles of units, and inverse lists."""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
from torch import Tensor

from lcdist_kernels.common import positive_scale
from lcdist_kernels.landmark.blocks import QueryRows
from lcdist_kernels.landmark.inner_loop import launch_for
from lcdist_kernels.landmark.sparse import BlockLists
from lcdist_kernels.landmark.sparse_kernel import (
    _sparse_bwd_dkv_kernel,
    _sparse_bwd_dq_kernel,
    _sparse_fwd_kernel,
)
from lcdist_kernels.landmark.sparse_work import Work, one_entry, sorted_readers, table_work
from lcdist_kernels.landmark.tile_configs import (
    BWD_DKV_TABLES,
    BWD_DQ_TABLES,
    FWD_TABLES,
)
from lcdist_kernels.landmark.union import invert
from lcdist_kernels.landmark.unit_tables import block_rows, unit_rows
from lcdist_kernels.tile_ranges import device_stream
from lcdist_kernels.triton_common import (
    LOG2E,
    Launch,
    check_kernel,
    last_dim_contiguous,
    launch_context,
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
    work, (k, v) = table_work(lists, query_rows), _table_sides(q, table)
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
    work, (k, v) = table_work(lists, query_rows), _table_sides(q, table)
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
    work = Work(chosen.contiguous(), lengths, rows, None)
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
        work = Work(chosen.contiguous(), lengths, rows, None)
        k, v = last_dim_contiguous(k), last_dim_contiguous(v)
        _backward(dout, q, k, v, out, lse, (dq, dk, dv), work, softmax_scale, launches)
    return dq, dk, dv


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, work: Work, softmax_scale: float,
    launch: Launch | None,
) -> Tensor:  # fmt: skip
    """Fill out and return lse."""
    q, softmax_scale = positive_scale(q, softmax_scale)
    q, lse = last_dim_contiguous(q), _new_lse(q)
    launch, *keys, described = work.keys(FWD_TABLES, launch, q, k, v)
    for part in work.united(q, k):
        own, ids = part.row_launch(launch, q), part.ids
        tiles = part.tiles(own, q)
        with launch_context(q):
            _sparse_fwd_kernel[(len(tiles), ids.shape[1], len(q))](
                q, *keys, out, lse, *part.list_tables(q, k), tiles, softmax_scale * LOG2E.value,
                q.shape[1], k.shape[1], *ids.shape[2:], *strides(q), *part.entry_strides(k, v),
                *strides(out), **part.list_constants(q, own), DESCRIBED=described,
            )  # fmt: skip
    return lse


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    grads: tuple[Tensor, ...], work: Work, softmax_scale: float,
    launches: tuple[Launch, Launch] | None,
) -> None:  # fmt: skip
    """Fill grads (dq, dk, dv)."""
    if softmax_scale < 0:
        _backward(dout, -q, k, v, out, lse, grads, work, -softmax_scale, launches)
        grads[0].neg_()
        return
    q, out, dout = (last_dim_contiguous(x) for x in (q, out, dout.to(q.dtype)))
    (dq, dk, dv), ids, size = grads, work.ids, work.rows.block_size
    for_dq, for_dkv = launches or (None, launch_for(BWD_DKV_TABLES, q, size))
    for_dq, *keys, described = work.keys(BWD_DQ_TABLES, for_dq, q, k, v)
    lse, delta = lse.contiguous(), torch.empty_like(lse, memory_format=torch.contiguous_format)
    local, inputs = work.begins is None, work.entry_strides(k, v)
    for part in work.united(q, k):
        own = part.row_launch(for_dq, q)
        tiles = part.tiles(own, q)
        with launch_context(q):
            _sparse_bwd_dq_kernel[(len(tiles), ids.shape[1], len(q))](
                q, *keys, out, dout, lse, delta, dq, *part.list_tables(q, k), tiles,
                float(softmax_scale), q.shape[1], k.shape[1], *part.ids.shape[2:], *strides(q),
                *inputs, *strides(out, dout, dq), **part.list_constants(q, own),
                DESCRIBED=described,
            )  # fmt: skip
    entries, place, gather = (
        k.shape[1] // size if local else len(k),
        device_stream(q),
        work.short(q),
    )
    if gather:
        readers, starts = invert(ids, work.lengths, entries, q.shape[1])
        segments = starts.shape[3]
    else:
        segments, (readers, starts) = 1, sorted_readers(ids, entries, local)
        for_dkv = work.row_launch(for_dkv, q)
    slots = work.slots(q)
    begins = slots if work.begins is None else work.begins
    own_rows = block_rows(work.rows.idx, size, entries, place) if local else begins
    constants = work.constants(q, for_dkv) | one_entry(for_dkv, size)
    grid = (entries * constants["STEPS"], ids.shape[1] if local else 1, len(q) if local else 1)
    with launch_context(q):
        _sparse_bwd_dkv_kernel[grid](
            q, k, v, dout, lse, delta, dk, dv, readers, starts, unit_rows(work.lengths, place),
            slots, begins, own_rows, float(softmax_scale), q.shape[1], entries, *ids.shape[2:],
            segments, ids.shape[1], *strides(q), *inputs, *strides(dout),
            *work.entry_strides(dk, dv), GATHER=gather, WIDE=rows_are_wide(ids.shape[1], q, dout),
            **constants,
        )  # fmt: skip


def rows_are_wide(nheads_kv: int, *tensors: Tensor) -> bool:
    """Return whether rows of one group of heads lie 2^31 elements or more apart."""
    group = tensors[0].shape[2] // nheads_kv
    lengths = (x.shape[1] * x.stride(1) + group * x.stride(2) for x in tensors)
    return max(lengths) >= 2**31


def _new_lse(q: Tensor) -> Tensor:
    """Return an empty lse `[b, h, s]` of q."""
    return torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)


def _table_sides(q: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values `[m, L, d]` of the table in the dtype and layout that kernels take."""
    check_kernel(q)
    assert table.dim() == 4 and table.shape[1] == 2 and table.shape[3] == q.shape[3]
    assert table.device == q.device
    k, v = last_dim_contiguous(table.to(q.dtype)).unbind(1)
    return k, v

"""Launches of landmark attention's dense kernels: tiles, tables and outputs.

Past blocks are a band over the slots where blocks begin, and the own block is a band over slots. So
both kinds of table are full attention's.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lcdist_kernels.common import TensorNotes, check_qkv
from lcdist_kernels.descriptors import make_descriptors, use_descriptors
from lcdist_kernels.full import kernel as full
from lcdist_kernels.landmark.blocks import QueryRows, slots_of
from lcdist_kernels.landmark.inner_loop import launch_for, tiling_of
from lcdist_kernels.landmark.kernel import (
    _landmark_bwd_dkv_kernel,
    _landmark_bwd_dq_kernel,
    _landmark_fwd_kernel,
)
from lcdist_kernels.landmark.tile_configs import (
    BWD_DKV_TABLES,
    BWD_DQ_TABLES,
    FWD_TABLES,
)
from lcdist_kernels.tile_ranges import (
    Band,
    DeviceStream,
    band_of,
    bounded_below,
    device_stream,
    indices_of,
    key_tables,
    query_tables,
)
from lcdist_kernels.triton_common import (
    LOG2E,
    Launch,
    check_kernel,
    head_constants,
    last_dim_contiguous,
    launch_context,
    strides,
    take_inputs,
)


class _Bands(NamedTuple):
    """Bands of the visible past blocks and of the visible slots of the own block."""

    past: Band
    own: Band
    place: DeviceStream

    @classmethod
    def of(cls, q: Tensor, rows: QueryRows, k_start: Tensor) -> "_Bands":
        """Return the bands of queries `rows` over blocks that begin at k_start."""
        key = indices_of(rows.idx), indices_of(rows.lo), rows.block_size
        past, own = _BANDS.find(k_start, key, lambda: _bands(rows, k_start))
        return cls(past, own, device_stream(q))

    def for_queries(self, launch: Launch, blocks: int) -> list[Tensor]:
        """Return the tables of a kernel that owns queries: past blocks, then own block."""
        block_m, place = launch.block_m, self.place
        past = query_tables(self.past, block_m, blocks, place)
        return past + query_tables(self.own, block_m, launch.block_n, place)

    def for_keys(self, launch: Launch, blocks: int, size: int) -> list[Tensor]:
        """Return the same tables for a kernel that owns `blocks` blocks of `size` tokens."""
        block_m, place = launch.block_m, self.place
        past = key_tables(self.past, block_m, blocks, place)
        return past + key_tables(self.own, block_m, blocks * size, place)


# Bands by the blocks of a visit. The same tensors of token numbers come again in every layer.
_BANDS = TensorNotes()


def _bands(rows: QueryRows, k_start: Tensor) -> tuple[Band, Band]:
    """Return the bands of past blocks and of the own block, which take time to make."""
    slots = slots_of(k_start, rows.block_size)
    return band_of(*rows.past, k_start), band_of(*rows.content, slots)


def _may_describe(size: int, k: Tensor, v: Tensor) -> bool:
    """Return whether tiles of whole blocks are consecutive rows that descriptors can load."""
    return size == triton.next_power_of_2(size) and use_descriptors(k, v)


def landmark_fwd(
    q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, k_start: Tensor, softmax_scale: float, *,
    out_dtype: torch.dtype | None = None, launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the partial (out `[b, s_q, h, d]`, lse `[b, h, s_q]`) of q over whole blocks.

    Like the tiled `landmark_fwd`, for bf16, fp16 and fp32, head_dim even and from 16 to 256.

    Args:
        out_dtype: of out, default fp32; lse is fp32.
        launch: tiles other than those of the table.

    Raises:
        ValueError: as `check_kernel`.
    """
    q, k, v, softmax_scale = take_inputs(q, k, v, softmax_scale)
    batch, seqlen, nheads, _ = q.shape
    out = torch.empty(q.shape, dtype=out_dtype or torch.float32, device=q.device)
    lse = torch.empty((batch, nheads, seqlen), dtype=torch.float32, device=q.device)
    if not q.numel() or not k.numel():
        return out.zero_(), lse.fill_(-torch.inf)
    size = rows.block_size
    fits = _may_describe(size, k, v)
    launch = launch or launch_for(FWD_TABLES, q, size, fits)
    bands, tiling = _Bands.of(q, rows, k_start), tiling_of(size, launch.block_n)
    described = fits and tiling.steps == 1
    keys = make_descriptors(launch.block_n, k, v) if described else (k, v)
    with launch_context(q):
        _landmark_fwd_kernel[(triton.cdiv(seqlen, launch.block_m), nheads, batch)](
            q, *keys, out, lse, *bands.for_queries(launch, tiling.blocks),
            softmax_scale * LOG2E.value, seqlen, k.shape[1], *strides(q, k, v, out),
            **head_constants(q, k), **tiling.constants(), HAS_LO=bounded_below(bands.past),
            DESCRIBED=described, **launch.options(),
        )  # fmt: skip
    return out, lse


def landmark_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: QueryRows,
    k_start: Tensor, softmax_scale: float, *,
    grad_dtype: torch.dtype | None = None, launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of (dq, dk, dv) that passes through these blocks.

    Like the tiled `landmark_bwd`: out and lse are over all keys that the queries see.

    Args:
        grad_dtype: of the gradients, default fp32.
        launches: tiles for dq and for dk, dv, other than those of the tables.

    Raises:
        ValueError: as `check_kernel`.
    """
    check_qkv(q, k, v)
    check_kernel(q)
    if softmax_scale < 0:
        dq, dk, dv = landmark_bwd(
            dout, -q, k, v, out, lse, rows, k_start, -softmax_scale, grad_dtype=grad_dtype,
            launches=launches,
        )  # fmt: skip
        return dq.neg_(), dk, dv
    q, k, v, out, dout = (last_dim_contiguous(x) for x in (q, k, v, out, dout.to(q.dtype)))
    batch, seqlen, nheads, _ = q.shape
    grads = {"dtype": grad_dtype or torch.float32, "device": q.device}
    dq, dk, dv = (torch.empty(x.shape, **grads) for x in (q, k, v))
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    size = rows.block_size
    fits = _may_describe(size, k, v)
    for_dq, for_dkv = launches or (
        launch_for(BWD_DQ_TABLES, q, size, fits),
        launch_for(BWD_DKV_TABLES, q, size),
    )
    bands = _Bands.of(q, rows, k_start)
    lse = lse.contiguous()
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    inputs = strides(q, k, v)
    sizes = head_constants(q, k) | {"HAS_LO": bounded_below(bands.past)}
    with launch_context(q):
        tiling = tiling_of(size, for_dq.block_n)
        described = fits and tiling.steps == 1
        keys = make_descriptors(for_dq.block_n, k, v) if described else (k, v)
        _landmark_bwd_dq_kernel[(triton.cdiv(seqlen, for_dq.block_m), nheads, batch)](
            q, *keys, out, dout, lse, delta, lse2, dq, *bands.for_queries(for_dq, tiling.blocks),
            float(softmax_scale), seqlen, k.shape[1], *inputs, *strides(out, dout, dq), **sizes,
            **tiling.constants(), DESCRIBED=described, **for_dq.options(),
        )  # fmt: skip
        tiling = tiling_of(size, for_dkv.block_n)
        tiles = triton.cdiv(len(k_start), tiling.blocks) * tiling.steps
        _landmark_bwd_dkv_kernel[(tiles, k.shape[2], batch)](
            q, k, v, dout, lse2, delta, dk, dv, *bands.for_keys(for_dkv, tiling.blocks, size),
            float(softmax_scale), seqlen, k.shape[1], *inputs, *strides(dout, dk), **sizes,
            **tiling.constants(), EVEN_M=seqlen % for_dkv.block_m == 0, **for_dkv.options(),
        )  # fmt: skip
    return dq, dk, dv


def own_fwd(
    q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, k_start: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the partial over each query's own block, like the tiled `own_fwd`."""
    slots = slots_of(k_start, rows.block_size)
    return full.full_fwd(q, k, v, *rows.content, slots, softmax_scale)


def own_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: QueryRows,
    k_start: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of the gradients through own blocks, like the tiled `own_bwd`."""
    slots = slots_of(k_start, rows.block_size)
    return full.full_bwd(dout, q, k, v, out, lse, *rows.content, slots, softmax_scale)

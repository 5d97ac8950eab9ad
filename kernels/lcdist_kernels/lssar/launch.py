"""Launches of LSSA's and LSSAR's kernels for bf16, fp16 and fp32, like the functions of `tiled`.

Queries, keys and values have one dtype, the model's, as tensor cores need. Statistics, sums and
gradients are fp32. Scores are in base 2: see `kernel`.
"""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any

import torch
import triton
from torch import Tensor

from lcdist_kernels.common import check_qkv
from lcdist_kernels.descriptors import make_descriptors, use_descriptors
from lcdist_kernels.lssar.inner_loop import POWER_BITS
from lcdist_kernels.lssar.kernel import (
    _lssar_bwd_dkv_kernel,
    _lssar_bwd_dq_kernel,
    _lssar_fwd_kernel,
    _lssar_rows_kernel,
    _lssar_sums_kernel,
)
from lcdist_kernels.lssar.rows import Band, Reweight, RowResults, Threshold, exponent
from lcdist_kernels.lssar.tile_configs import (
    BWD_DKV,
    BWD_DKV_DESCRIBED,
    BWD_DKV_HOPPER,
    BWD_DQ,
    FWD,
    FWD_HOPPER,
    SUMS,
    SUMS_HOPPER,
)
from lcdist_kernels.lssar.tiled import RowStats, Sums
from lcdist_kernels.tile_ranges import (
    band_of,
    bounded_below,
    device_stream,
    key_tables,
    on_device,
    query_tables,
)
from lcdist_kernels.triton_common import (
    Launch,
    check_kernel,
    choose_launch,
    head_constants,
    last_dim_contiguous,
    launch_context,
    padded,
    strides,
)

ROWS_BLOCK = 32


def lssar_sums(
    q: Tensor, k: Tensor, band: Band, *, launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sum and the maximum of f over a block's visible keys, fp32 `[b, h, s_q]` each.

    Like the tiled `lssar_sums`, for bf16, fp16 and fp32, head_dim even and from 16 to 256. launch:
    tiles other than those of the table. Raises as `check_kernel`.
    """
    check_qkv(q, k, k)
    check_kernel(q)
    q, k = last_dim_contiguous(q), last_dim_contiguous(k)
    batch, seqlen, nheads, _ = q.shape
    total, top = (_row(q) for _ in range(2))
    if not q.numel() or not k.numel():
        return total.zero_(), top.zero_()
    launch, described = launch or choose_launch(SUMS, q, SUMS_HOPPER), use_descriptors(k)
    (keys,) = make_descriptors(launch.block_n, k) if described else (k,)
    tables = query_tables(band_of(*band), launch.block_m, launch.block_n, device_stream(q))
    with launch_context(q):
        _lssar_sums_kernel[(triton.cdiv(seqlen, launch.block_m), nheads, batch)](
            q, keys, total, top, *tables, seqlen, k.shape[1], *strides(q, k), **_sizes(q, k, band),
            DESCRIBED=described, **launch.options(),
        )  # fmt: skip
    return total, top


def lssar_fwd(
    q: Tensor, k: Tensor, v: Tensor, band: Band, threshold: Threshold, reweight: Reweight | None,
    slope: bool, *,
    launch: Launch | None = None,
) -> Sums:  # fmt: skip
    """Return the sums over a block's visible keys, fp32; like the tiled `lssar_fwd`."""
    slope = slope and reweight is not None
    out, total = _out(q, torch.float32), _row(q)
    out_x, total_x = (_out(q, torch.float32), _row(q)) if slope else (out, total)
    mean, inverse = (x.contiguous() for x in threshold)
    check_kernel(q)
    if not q.numel() or not k.numel():
        for x in (out, out_x, total, total_x):
            x.zero_()
    else:
        buffers = (mean, inverse, inverse, out, total, out_x, total_x)
        _fwd(q, k, v, band, reweight, buffers, slope, False, launch)
    return Sums(out, total, (out_x, total_x) if slope else None)


def lssar_whole(
    q: Tensor, k: Tensor, v: Tensor, band: Band, reweight: Reweight | None, slope: bool = False, *,
    launch: Launch | None = None,
) -> RowResults:  # fmt: skip
    """Return results of rows over a block that holds all their keys.

    Like `epilogue.lssar_whole`; out and slope are in v.dtype. launch: tiles of both sweeps. Raises
    as `lssar_sums`.
    """
    slope = slope and reweight is not None
    out, mean, gamma = _out(q, v.dtype), _row(q), _row(q)
    out_x = _out(q, v.dtype) if slope else out
    check_kernel(q)
    if not q.numel() or not k.numel():
        for x in (out, out_x, mean, gamma):
            x.zero_()
    else:
        total, top = (gamma, gamma) if reweight is None else lssar_sums(q, k, band, launch=launch)
        buffers = (mean, top, gamma, out, total, out_x, mean)
        _fwd(q, k, v, band, reweight, buffers, slope, True, launch)
    return RowResults(out, out_x if slope else None, mean, gamma)


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, band: Band, reweight: Reweight | None,
    buffers: tuple[Tensor, ...], slope: bool, whole: bool, launch: Launch | None,
) -> None:  # fmt: skip
    """Launch the forward kernel.

    buffers: mean, inverse, gamma, out, total, out_x, total_x; some are read, some unused.
    """
    check_qkv(q, k, v)
    check_kernel(q)
    q, k, v = (last_dim_contiguous(x) for x in (q, k, v))
    batch, seqlen, nheads, _ = q.shape
    launch, described = launch or choose_launch(FWD, q, FWD_HOPPER), use_descriptors(k, v)
    keys = make_descriptors(launch.block_n, k, v) if described else (k, v)
    tables = query_tables(band_of(*band), launch.block_m, launch.block_n, device_stream(q))
    with launch_context(q):
        _lssar_fwd_kernel[(triton.cdiv(seqlen, launch.block_m), nheads, batch)](
            q, *keys, *buffers, *tables, exponent(reweight),
            0 if reweight is None else reweight.exempt_rows, seqlen, k.shape[1],
            *strides(q, k, v, buffers[3]), **_power(reweight), SLOPE=slope, WHOLE=whole,
            **_sizes(q, k, band), DESCRIBED=described, **launch.options(),
        )  # fmt: skip


def lssar_rows(
    dout: Tensor, out: Tensor, slope: Tensor | None, mean: Tensor, gamma: Tensor, band: Band,
    reweight: Reweight | None,
) -> RowStats:  # fmt: skip
    """Return the row statistics that `lssar_bwd` needs; like `epilogue.lssar_rows`."""
    check_kernel(out)
    batch, seqlen, nheads, head_dim = out.shape
    dout, out = last_dim_contiguous(dout), last_dim_contiguous(out)
    delta, drift = torch.empty_like(gamma), torch.empty_like(gamma)
    e = out if slope is None else last_dim_contiguous(slope)
    numbers, place = band_of(*band), device_stream(out)
    if not out.numel():
        return RowStats(mean, gamma, delta, drift)
    with launch_context(out):
        _lssar_rows_kernel[(triton.cdiv(seqlen, ROWS_BLOCK), nheads, batch)](
            dout, out, e, gamma, delta, drift, on_device(numbers.q_idx, place),
            on_device(numbers.q_lo, place), 0 if reweight is None else reweight.exempt_rows, seqlen,
            *strides(dout, out, e), SLOPE=slope is not None, HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim), BLOCK_M=ROWS_BLOCK,
        )  # fmt: skip
    return RowStats(mean, gamma, delta, drift)


def lssar_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Band, row: RowStats,
    reweight: Reweight | None, *,
    values_dtype: torch.dtype | None = None,
    launches: tuple[Launch, Launch] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of the gradients of q, k and v through this block of keys, fp32.

    Like the tiled `lssar_bwd`.

    Args:
        values_dtype: of the gradient of v instead of fp32.
        launches: tiles for dq and for dk, dv.

    Raises:
        ValueError: as `lssar_sums`.
    """
    check_qkv(q, k, v)
    check_kernel(q)
    q, k, v, dout = (last_dim_contiguous(x) for x in (q, k, v, dout.to(q.dtype)))
    batch, seqlen, nheads, _ = q.shape
    dq, dk = (_out(x, torch.float32) for x in (q, k))
    dv = _out(v, values_dtype or torch.float32)
    if not q.numel() or not k.numel():
        return dq.zero_(), dk.zero_(), dv.zero_()
    by_keys, by_rows = use_descriptors(k, v), use_descriptors(q, dout)
    for_hopper = BWD_DKV_HOPPER | (BWD_DKV_DESCRIBED if by_rows else {})
    for_dq, for_dkv = launches or (choose_launch(BWD_DQ, q), choose_launch(BWD_DKV, q, for_hopper))
    keys = make_descriptors(for_dq.block_n, k, v) if by_keys else (k, v)
    rows = make_descriptors(for_dkv.block_m, q, dout) if by_rows else (q, dout)
    numbers, place = band_of(*band), device_stream(q)
    own_rows = [x.contiguous() for x in row]
    made = [torch.empty_like(x) for x in own_rows[:3]]
    inputs = strides(q, k, v, dout)
    words = _power(reweight) | _sizes(q, k, band)
    with launch_context(q):
        _lssar_bwd_dq_kernel[(triton.cdiv(seqlen, for_dq.block_m), nheads, batch)](
            q, *keys, dout, *own_rows, *made, dq,
            *query_tables(numbers, for_dq.block_m, for_dq.block_n, place), exponent(reweight),
            seqlen, k.shape[1], *inputs, *strides(dq), **words, DESCRIBED=by_keys,
            **for_dq.options(),
        )  # fmt: skip
        _lssar_bwd_dkv_kernel[(triton.cdiv(k.shape[1], for_dkv.block_n), k.shape[2], batch)](
            rows[0], k, v, rows[1], made[0], own_rows[1], made[1], made[2], dk, dv,
            *key_tables(numbers, for_dkv.block_m, for_dkv.block_n, place), exponent(reweight),
            seqlen, k.shape[1], *inputs, *strides(dk), **words,
            EVEN_M=seqlen % for_dkv.block_m == 0, DESCRIBED=by_rows, **for_dkv.options(),
        )  # fmt: skip
    return dq, dk, dv


def _out(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor shaped like `like`."""
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _row(q: Tensor) -> Tensor:
    """Return an empty fp32 `[b, h, s]` for q `[b, s, h, d]`: one number per row."""
    return torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)


def _power(reweight: Reweight | None) -> dict[str, Any]:
    """Return the constants that a kernel is compiled with for the power."""
    times = exponent(reweight) - 1
    known = times == int(times) and 0 <= times < 2**POWER_BITS.value
    return {"TIMES": int(times) if known else -1, "SHARP": reweight is not None}


def _sizes(q: Tensor, k: Tensor, band: Band) -> dict[str, Any]:
    """Return the constants of heads, limits and precision."""
    return {
        **head_constants(q, k),
        "HAS_LO": bounded_below(band_of(*band)),
        "PRECISE": q.dtype == torch.float32,
    }

"""Landmark attention tile by tile in torch: linear memory, gradients written by hand.

A row's keys are those of its own block, each one softmax entry, and the past blocks, one entry each
(`block_gates`). The former are a band over slots, computed by full attention's tiles; the latter a
band over blocks. Both partials merge like any two. So a block of the sequence, whole blocks of L
tokens, gives its exact share of (out, lse), and with these of the whole row, of the gradients.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lcdist_kernels.common import TensorNotes
from lcdist_kernels.full.tiled import full_bwd, full_fwd
from lcdist_kernels.landmark.block_gates import GateAccumulator, GateGrads
from lcdist_kernels.landmark.blocks import QueryRows, slots_of
from lcdist_kernels.partial import merge, reaches
from lcdist_kernels.tile_ranges import indices_of
from lcdist_kernels.tiles import SCORES_AT_ONCE, Tile, fold, tile_sides, tiles_of_band, unfold


def sees_any(rows: QueryRows, k_start: Tensor) -> bool:
    """Return False if the extremes show that no query sees any of the blocks at k_start."""

    def reached() -> bool:
        slots = slots_of(k_start, rows.block_size)
        return reaches(*rows.past, k_start) or reaches(*rows.content, slots)

    key = indices_of(rows.idx), indices_of(rows.lo), rows.block_size
    return _SEEN.find(k_start, key, reached)


_SEEN = TensorNotes()


def landmark_fwd(
    q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, k_start: Tensor, softmax_scale: float, *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the partial (out `[b, s_q, h, d]`, lse `[b, h, s_q]`) of q over whole blocks.

    Args:
        q, k, v: `[b, s_q, h, d]`, `[b, n L, h_kv, d]` twice; q and k rotated.
        k_start: the first slots of the n blocks, int64 `[n]` on the CPU.
        out_dtype: of out; default, and dtype of lse: the wider of fp32 and q.dtype.

    A query that sees nothing has out = 0, lse = -inf.
    """
    row = (q, k, v, rows, k_start, softmax_scale)
    if not reaches(*rows.past, k_start):
        out, lse = own_fwd(*row)
    elif not reaches(*rows.content, slots_of(k_start, rows.block_size)):
        out, lse = past_fwd(*row)
    else:
        out, lse = merge(*past_fwd(*row), *own_fwd(*row))
    return out.to(out_dtype or out.dtype), lse


def landmark_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: QueryRows,
    k_start: Tensor, softmax_scale: float, *,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of (dq, dk, dv) that passes through these blocks.

    Args:
        dout, out: like q. lse: `[b, h, s_q]`. out and lse are over all keys that the queries see.
        grad_dtype: of the results; default: the wider of fp32 and q.dtype.
        other: as in `landmark_fwd`.
    """
    row = (dout, q, k, v, out, lse, rows, k_start, softmax_scale)
    if not reaches(*rows.past, k_start):
        grads = own_bwd(*row)
    else:
        grads = past_bwd(*row)
        if reaches(*rows.content, slots_of(k_start, rows.block_size)):
            grads = (x.add_(y) for x, y in zip(grads, own_bwd(*row), strict=True))
    dq, dk, dv = (x.to(grad_dtype or x.dtype) for x in grads)
    return dq, dk, dv


def own_fwd(
    q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, k_start: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the partial over each query's own block; as `landmark_fwd`."""
    return full_fwd(q, k, v, *rows.content, slots_of(k_start, rows.block_size), softmax_scale)


def own_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: QueryRows,
    k_start: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of the gradients through own blocks; as `landmark_bwd`."""
    slots = slots_of(k_start, rows.block_size)
    return full_bwd(dout, q, k, v, out, lse, *rows.content, slots, softmax_scale)


def past_fwd(
    q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, k_start: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the partial over past blocks; as `landmark_fwd`."""
    shape, size, nheads_kv = q.shape, rows.block_size, k.shape[2]
    q, k, v = (fold(x, nheads_kv) for x in (q, k, v))
    k, v = k.squeeze(1), v.squeeze(1)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    for part, tiles, scratch in _past_parts(q, k, rows, k_start, buffers=2):
        gates = GateAccumulator(q[part].flatten(1, 2) * softmax_scale)
        for first, last, hidden in tiles:
            own = slice(first * size, last * size)
            gates.add(k[part[0], own], v[part[0], own], hidden, size, scratch)
        for whole, rows_result in zip((out, lse), gates.result(), strict=True):
            whole[part] = rows_result.view(whole[part].shape)
    return unfold(out, shape), lse.view(shape[0], shape[2], shape[1])


def past_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rows: QueryRows,
    k_start: Tensor, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of the gradients through past blocks; as `landmark_bwd`."""
    shapes, size, nheads_kv = (q.shape, k.shape), rows.block_size, k.shape[2]
    dout, q, k, v, out = (fold(x, nheads_kv) for x in (dout, q, k, v, out))
    k, v = k.squeeze(1), v.squeeze(1)
    delta = (dout * out).sum(-1)
    lse = lse.reshape(delta.shape)
    # `out` is no longer needed: its buffer takes dq.
    dq, dk, dv = out.zero_(), torch.zeros_like(k), torch.zeros_like(v)
    for part, tiles, scratch in _past_parts(q, k, rows, k_start, buffers=3):
        grads = GateGrads(
            dout[part].flatten(1, 2),
            q[part].flatten(1, 2) * softmax_scale,
            lse[part].flatten(1)[..., None],
            delta[part].flatten(1)[..., None],
        )
        for first, last, hidden in tiles:
            own = (part[0], slice(first * size, last * size))
            grads.add((k[own], v[own]), (dk[own], dv[own]), hidden, size, scratch)
        dq[part] = grads.dq.view(dq[part].shape)
    dq.mul_(softmax_scale)
    return unfold(dq, shapes[0]), unfold(dk[:, None], shapes[1]), unfold(dv[:, None], shapes[1])


def _past_parts(
    q: Tensor, k: Tensor, rows: QueryRows, k_start: Tensor, buffers: int
) -> Iterator[tuple[tuple[slice, slice, slice], list[Tile], Tensor]]:
    """Yield the parts of folded q, the tiles of past blocks of each, and buffers of scores."""
    block_q, blocks, units = sides(q, k, rows.block_size)
    scratch = q.new_empty(buffers, units * q.shape[1] * block_q * blocks * rows.block_size)
    for start, stop, tiles in tiles_of_band(*rows.past, k_start, block_q, blocks, q.device):
        for unit in range(0, len(q), units):
            yield (slice(unit, unit + units), slice(None), slice(start, stop)), tiles, scratch


def sides(q: Tensor, k: Tensor, size: int) -> tuple[int, int, int]:
    """Return queries and blocks per tile, and key heads at once, for folded q and k."""
    block_q, block_k, _ = tile_sides(q, k)
    # A larger block is not cut; fewer rows per tile would load it too often.
    blocks = max(1, block_k // size)
    area = q.shape[1] * block_q * blocks * size
    return block_q, blocks, min(len(q), max(1, SCORES_AT_ONCE // area))

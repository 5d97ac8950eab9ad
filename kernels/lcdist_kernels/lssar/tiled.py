"""LSSA and LSSAR tile by tile in torch: linear memory, gradients written by hand.

Two sweeps forward, one backward. The first gives every row's sum and maximum of f, hence mu_i and
kappa_i = 1 / (max_j f_ij - mu_i). LSSA has mu = 0, kappa = 1 and p = 1 and skips it. With y_ij =
kappa_i relu(f_ij - mu_i) the second accumulates

    W_i  = sum_j y_ij^p          A_i  = sum_j y_ij^p v_j
    W'_i = sum_j y_ij^(p-1)      A'_i = sum_j y_ij^(p-1) v_j

Then out_i = A_i / W_i and e_i = p kappa_i / W_i (A'_i - W'_i out_i) = -d out_i / d mu_i. With
gamma_i = kappa_i W_i^(-1/p), y_ij = gamma_i relu(f_ij - mu_i) and D_i = dout_i . out_i,

    df_ij = p gamma_i y_ij^(p-1) (dout_i . v_j - D_i) - o_i / N_i dout_i . e_i     over visible j
    dv_j = sum_i y_ij^p dout_i          ds_ij = sigmoid(s_ij) df_ij
    dq_i = sum_j ds_ij k_j              dk_j = sum_i ds_ij q_i

where q is the direction times c_i and k the direction (`rows`). All are plain sums over keys, so
blocks of keys add up, here and on a ring. Masked scores have f = 0, where the sigmoid, which is 1 -
exp(-f), is 0 too: no gradient passes through them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.lssar.rows import Band, Reweight, Threshold, exponent
from lcdist_kernels.tiles import Tile, fold, tile_sides, tiles_of_band, unfold, view_of

RowSlices = tuple[slice, slice, slice]


class Sums(NamedTuple):
    """Sums over some keys: A `[b, s, h, d]` and W `[b, h, s]`; slope: A' and W' or None."""

    out: Tensor
    total: Tensor
    slope: tuple[Tensor, Tensor] | None

    def plus(self, other: "Sums") -> "Sums":
        """Return the sums over the keys of both; both have a slope or neither has."""
        slope = None
        if self.slope is not None and other.slope is not None:
            slope = self.slope[0] + other.slope[0], self.slope[1] + other.slope[1]
        return Sums(self.out + other.out, self.total + other.total, slope)


def lssar_sums(q: Tensor, k: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Return the sum and the maximum of f over a block's visible keys, each `[b, h, s_q]`.

    q `[b, s_q, h, d]`: directions times their logit scales. k `[b, s_k, h_kv, d]`: directions. Both
    in the wider of fp32 and the model's dtype. 0 where a query sees nothing.
    """
    shape = (q.shape[0], q.shape[2], q.shape[1])
    q, k = fold(q, k.shape[2]), fold(k, k.shape[2]).squeeze(1)
    total, top = q.new_zeros(q.shape[:3]), q.new_zeros(q.shape[:3])
    for rows, tiles, scratch in _tile_rows(q, k, band, buffers=2):
        queries, sums, tops = _flatten_rows(q, rows), total[rows], top[rows]
        for tile in tiles:
            scores = _softplus(queries, k[rows[0]], tile, scratch, sums.shape[1:])
            sums += scores.sum(-1).view(sums.shape)
            tops.copy_(torch.maximum(tops, scores.amax(-1).view(sums.shape)))
    return total.view(shape), top.view(shape)


def lssar_fwd(
    q: Tensor, k: Tensor, v: Tensor, band: Band, threshold: Threshold, reweight: Reweight | None,
    slope: bool,
) -> Sums:  # fmt: skip
    """Return the sums over a block's visible keys.

    Args:
        q, k: as in `lssar_sums`.
        v: like k, of any dtype.
        threshold: of the rows over all their keys.
        slope: also accumulate A' and W', which LSSA does not need.
    """
    slope, power = slope and reweight is not None, exponent(reweight)
    shapes = q.shape, (q.shape[0], q.shape[2], q.shape[1])
    q, k, v = fold(q, k.shape[2]), fold(k, k.shape[2]).squeeze(1), fold(v, k.shape[2]).squeeze(1)
    mean, inverse = (x.reshape(q.shape[:3]) for x in threshold)
    outs = [torch.zeros_like(q) for _ in range(1 + slope)]
    totals = [q.new_zeros(q.shape[:3]) for _ in outs]
    for rows, tiles, scratch in _tile_rows(q, k, band, buffers=2):
        queries, own_mean, own_inverse = (
            _flatten_rows(q, rows),
            _flatten_rows(mean, rows),
            _flatten_rows(inverse, rows),
        )
        part = [torch.zeros_like(queries) for _ in outs]
        for tile in tiles:
            y = _softplus(queries, k[rows[0]], tile, scratch, mean[rows].shape[1:])
            y.sub_(own_mean).clamp_min_(0).mul_(own_inverse)
            # `_softplus` no longer needs its second buffer.
            weights = _powers(y, power, view_of(scratch[1], _shape(y)))
            for out, total, weight in zip(part, totals, weights, strict=False):
                out.baddbmm_(weight, v[rows[0], tile.k_start : tile.k_stop])
                total[rows] += weight.sum(-1).view(total[rows].shape)
        for out, rows_out in zip(outs, part, strict=True):
            out[rows] = rows_out.view(out[rows].shape)
    sums = [unfold(x, shapes[0]) for x in outs], [x.view(shapes[1]) for x in totals]
    return Sums(sums[0][0], sums[1][0], (sums[0][1], sums[1][1]) if slope else None)


class RowStats(NamedTuple):
    """Row statistics of the backward, over all keys, each `[b, h, s]`.

    mean: mu. delta: D. drift: o / N dout . e.
    """

    mean: Tensor
    gamma: Tensor
    delta: Tensor
    drift: Tensor


def lssar_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Band, row: RowStats,
    reweight: Reweight | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of the gradients of q, k and v that passes through this block of keys.

    dout like q; q, k, v, band as in `lssar_fwd`. The result is in the dtype of q.
    """
    shapes, nheads_kv, power = (q.shape, k.shape), k.shape[2], exponent(reweight)
    dout, q, k, v = (fold(x, nheads_kv) for x in (dout, q, k, v))
    k, v = k.squeeze(1), v.squeeze(1)
    stats = [x.reshape(q.shape[:3]) for x in row]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, tiles, scratch in _tile_rows(q, k, band, buffers=3):
        own = RowStats(*(_flatten_rows(x, rows) for x in stats))
        queries, douts = _flatten_rows(q, rows), _flatten_rows(dout, rows)
        part, group = torch.zeros_like(queries), (q.shape[1], rows[2].stop - rows[2].start)
        for tile in tiles:
            keys = (rows[0], slice(tile.k_start, tile.k_stop))
            scores = _softplus(queries, k[rows[0]], tile, scratch, group)
            y = torch.sub(scores, own.mean, out=view_of(scratch[1], _shape(scores)))
            y.clamp_min_(0).mul_(own.gamma)
            weights, slopes = _powers(y, power, view_of(scratch[2], _shape(scores)))
            dv[keys].baddbmm_(weights.transpose(1, 2), douts)
            # The weights are no longer needed: their buffer takes df.
            dscores = torch.bmm(douts, v[keys].transpose(1, 2), out=weights)
            dscores.sub_(own.delta).mul_(slopes).mul_(power * own.gamma).sub_(own.drift)
            dscores.mul_(scores.neg_().expm1_().neg_())
            dk[keys].baddbmm_(dscores.transpose(1, 2), queries)
            part.baddbmm_(dscores, k[keys])
        dq[rows] = part.view(dq[rows].shape)
    return unfold(dq, shapes[0]), unfold(dk[:, None], shapes[1]), unfold(dv[:, None], shapes[1])


def _tile_rows(
    q: Tensor, k: Tensor, band: Band, buffers: int
) -> Iterator[tuple[RowSlices, list[Tile], Tensor]]:
    """Yield some heads of a tile of folded queries, their tiles of keys, and score buffers."""
    block_q, block_k, units = tile_sides(q, k)
    scratch = q.new_empty(buffers, units * q.shape[1] * block_q * block_k)
    for start, stop, tiles in tiles_of_band(*band, block_q, block_k, q.device):
        for unit in range(0, len(q), units):
            yield (slice(unit, unit + units), slice(None), slice(start, stop)), tiles, scratch


def _flatten_rows(x: Tensor, rows: RowSlices) -> Tensor:
    """Return the heads of a group as rows: [u, g * s, d], or [u, g * s, 1] of [u, g, s]."""
    part = x[rows]
    return part.flatten(1, 2) if part.dim() == 4 else part.flatten(1)[..., None]


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Return the shape of a 3-dimensional tensor."""
    return x.shape[0], x.shape[1], x.shape[2]


def _softplus(q: Tensor, k: Tensor, tile: Tile, scratch: Tensor, group: tuple[int, ...]) -> Tensor:
    """Return softplus(q . k) in the first buffer, 0 where hidden; the second buffer is free again.

    group: (heads per key head, queries), the dims that the rows of q were flattened from.
    """
    shape = (len(q), q.shape[1], tile.k_stop - tile.k_start)
    scores, decay = view_of(scratch[0], shape), view_of(scratch[1], shape)
    torch.bmm(q, k[:, tile.k_start : tile.k_stop].transpose(1, 2), out=scores)
    # max(s, 0) + ln(1 + exp(-|s|)) neither overflows nor loses small values.
    torch.abs(scores, out=decay).neg_().exp_().log1p_()
    scores.clamp_min_(0).add_(decay)
    if tile.hidden is not None:
        scores.view(len(q), *group, -1).masked_fill_(tile.hidden, 0.0)
    return scores


def _powers(y: Tensor, power: float, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y^p, y^(p-1)), both 0 where y is 0: in y's memory and in `buffer`."""
    slopes = torch.pow(y, power - 1, out=buffer)
    if power <= 1:
        slopes.masked_fill_(y == 0, 0.0)
    return y.mul_(slopes), slopes

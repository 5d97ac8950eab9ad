"""From sums over keys to results of rows, and what a backward needs of them: tiled LSSA and LSSAR.

With gamma_i = kappa_i W_i^(-1/p) (`tiled`), e_i / gamma_i = p W_i^(1/p) / W_i (A'_i - W'_i out_i)
is kept in e's place: on a nearly flat row e itself is beyond the range of fp16.
"""

import torch
from torch import Tensor

from lcdist_kernels.lssar.reference import divisor
from lcdist_kernels.lssar.rows import (
    Band,
    Finished,
    Reweight,
    Threshold,
    exponent,
    mean_shares,
    no_threshold,
    row_threshold,
)
from lcdist_kernels.lssar.tiled import Saved, Sums, lssar_fwd, lssar_sums


def lssar_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    reweight: Reweight | None,
    slope: bool = False,
) -> Finished:
    """Rows over a block that holds all keys they see. q, k, v, band: as in `lssar_fwd`.

    slope: with what a backward needs, where that is not zero.
    """
    threshold = no_threshold(q)
    if reweight is not None:
        shares = mean_shares(band.counts, reweight, q)
        threshold = row_threshold(*lssar_sums(q, k, band), shares)
    sums = lssar_fwd(q, k, v, band, threshold, reweight, slope)
    return lssar_finish(sums, threshold, reweight)


def lssar_finish(sums: Sums, threshold: Threshold, reweight: Reweight | None) -> Finished:
    """The result of rows whose `sums` are over all their keys; slope is None without theirs."""
    total, power = divisor(sums.total), exponent(reweight)
    out = sums.out / total
    gamma = threshold.inverse * sums.total.masked_fill(sums.total == 0, torch.inf).pow(-1 / power)
    if sums.slope is None:
        return Finished(out, None, threshold.mean, gamma)
    slope = sums.slope[0] - sums.slope[1].transpose(1, 2)[..., None] * out
    return Finished(out, slope * (power * total.pow(1 / power - 1)), threshold.mean, gamma)


def lssar_rows(
    dout: Tensor, out: Tensor, slope: Tensor | None, mean: Tensor, gamma: Tensor, band: Band,
    reweight: Reweight | None,
) -> Saved:  # fmt: skip
    """What `lssar_bwd` needs of every row; slope: e / gamma, None for LSSA. Of `band`, the queries.

    dout, out, slope `[b, s, h, d]`; mean, gamma `[b, h, s]`, of the dtype of the result.
    """
    dout = dout.to(mean.dtype)
    delta = (dout * out).sum(-1).transpose(1, 2)
    drift = torch.zeros_like(mean)
    if slope is not None:
        shares = mean_shares(band.counts, reweight, mean)
        drift = (dout * slope).sum(-1).transpose(1, 2) * gamma * shares
    return Saved(mean, gamma, delta, drift)

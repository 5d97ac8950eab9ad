"""Results of rows from sums over keys, and the row statistics of the backward (tiled LSSA, LSSAR).

With gamma_i = kappa_i W_i^(-1/p) (`tiled`), e_i / gamma_i = p W_i^(1/p) / W_i (A'_i - W'_i out_i)
is saved in place of e: on a nearly flat row e itself exceeds the range of fp16.
"""

import torch
from torch import Tensor

from lcdist_kernels.lssar.reference import divisor
from lcdist_kernels.lssar.rows import (
    Band,
    Reweight,
    RowResults,
    Threshold,
    exponent,
    mean_shares,
    no_threshold,
    row_threshold,
)
from lcdist_kernels.lssar.tiled import RowStats, Sums, lssar_fwd, lssar_sums


def lssar_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    reweight: Reweight | None,
    slope: bool = False,
) -> RowResults:
    """Return the results of rows over a block that holds all keys they see.

    q, k, v, band: as in `lssar_fwd`. slope: also compute e / gamma for the backward; zero for LSSA.
    """
    threshold = no_threshold(q)
    if reweight is not None:
        shares = mean_shares(band.counts, reweight, q)
        threshold = row_threshold(*lssar_sums(q, k, band), shares)
    sums = lssar_fwd(q, k, v, band, threshold, reweight, slope)
    return lssar_finish(sums, threshold, reweight)


def lssar_finish(sums: Sums, threshold: Threshold, reweight: Reweight | None) -> RowResults:
    """Return the results of rows from `sums` over all their keys; slope as in the sums."""
    total, power = divisor(sums.total), exponent(reweight)
    out = sums.out / total
    gamma = threshold.inverse * sums.total.masked_fill(sums.total == 0, torch.inf).pow(-1 / power)
    if sums.slope is None:
        return RowResults(out, None, threshold.mean, gamma)
    slope = sums.slope[0] - sums.slope[1].transpose(1, 2)[..., None] * out
    return RowResults(out, slope * (power * total.pow(1 / power - 1)), threshold.mean, gamma)


def lssar_rows(
    dout: Tensor, out: Tensor, slope: Tensor | None, mean: Tensor, gamma: Tensor, band: Band,
    reweight: Reweight | None,
) -> RowStats:  # fmt: skip
    """Return the row statistics that `lssar_bwd` needs.

    Args:
        dout, out: `[b, s, h, d]`.
        slope: e / gamma, like out; None for LSSA.
        mean, gamma: `[b, h, s]`, in the dtype of the result.
        band: only its queries are used.
    """
    dout = dout.to(mean.dtype)
    delta = (dout * out).sum(-1).transpose(1, 2)
    drift = torch.zeros_like(mean)
    if slope is not None:
        shares = mean_shares(band.counts, reweight, mean)
        drift = (dout * slope).sum(-1).transpose(1, 2) * gamma * shares
    return RowStats(mean, gamma, delta, drift)

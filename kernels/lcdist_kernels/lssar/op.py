"""LSSA and LSSAR as a function of torch, with gradients and a choice of implementation.

"torch" is the tiled one, "reference" the dense one; "auto" takes the tiled one.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import announce, check_impl, check_self, document_starts
from lcdist_kernels.lssar.reference import SHARPENED, divisor, lssar_reference
from lcdist_kernels.lssar.rows import (
    Band,
    Reweight,
    Threshold,
    directions,
    exponent,
    logit_scales,
    mean_shares,
    no_threshold,
    row_threshold,
)
from lcdist_kernels.lssar.tiled import Saved, Sums, lssar_bwd, lssar_fwd, lssar_sums
from lcdist_kernels.rotary import Rotary

BUILT = ("auto", "torch", "reference")


class Finished(NamedTuple):
    """Rows over all their keys: out, slope (e) `[b, s, h, d]`; mean (mu), gamma `[b, h, s]`."""

    out: Tensor
    slope: Tensor | None
    mean: Tensor
    gamma: Tensor


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
    by_row = threshold.inverse.transpose(1, 2)[..., None] / total
    slope = sums.slope[0] - sums.slope[1].transpose(1, 2)[..., None] * out
    return Finished(out, slope * (power * by_row), threshold.mean, gamma)


def lssar_rows(
    dout: Tensor,
    out: Tensor,
    slope: Tensor | None,
    mean: Tensor,
    gamma: Tensor,
    shares: Tensor,
) -> Saved:
    """What `lssar_bwd` needs of every row. shares: see `mean_shares`; slope: None for LSSA."""
    dout = dout.to(mean.dtype)
    delta = (dout * out).sum(-1).transpose(1, 2)
    drift = torch.zeros_like(mean)
    if slope is not None:
        drift = (dout * slope).sum(-1).transpose(1, 2) * shares
    return Saved(mean, gamma, delta, drift)


def lssar_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    reweight: Reweight | None = SHARPENED,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, un-rotated; out is like q.

    impl: "auto", "torch" or "reference". The rest, and what raises ValueError, as in
    `lssar_reference`; also an `impl` that is not built.
    """
    check_impl(impl, "lssar", BUILT)
    if impl == "reference":
        return lssar_reference(
            q,
            k,
            v,
            reweight=reweight,
            rotary=rotary,
            positions=positions,
            cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )
    check_self(q, k, v)
    if impl == "auto":
        announce("lssar attention: tiled torch, as no kernel is built yet")
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    positions = index - starts if positions is None else positions
    queries, keys = directions(q, rotary, positions), directions(k, rotary, positions)
    band = Band(index, starts, index)
    queries = queries * logit_scales(band.counts, softmax_scale, queries)
    return LssarFunction.apply(queries, keys, v, band, reweight)


def lssar_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    reweight: Reweight | None,
    rotary: Rotary | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """New tokens q `[b, n, h, d]` at `positions` `[n]` over k, v of positions 0, 1, ...; like q."""
    band = Band(positions, torch.zeros_like(positions), torch.arange(k.shape[1]))
    queries, keys = directions(q, rotary, positions), directions(k, rotary, band.k_idx)
    queries = queries * logit_scales(band.counts, softmax_scale, queries)
    return lssar_whole(queries, keys, v, band, reweight).out.to(q.dtype)


class LssarFunction(torch.autograd.Function):
    """Self-attention in one block of directions; kept: them, v, out, e and two scalars a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, band: Band, reweight: Reweight | None):
        done = lssar_whole(q, k, v, band, reweight, slope=any(ctx.needs_input_grad))
        out, e = done.out.to(v.dtype), None if done.slope is None else done.slope.to(v.dtype)
        ctx.save_for_backward(q, k, v, out, e, done.mean, done.gamma)
        ctx.band, ctx.reweight = band, reweight
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *row = ctx.saved_tensors
        band, reweight = ctx.band, ctx.reweight
        saved = lssar_rows(dout, *row, shares=mean_shares(band.counts, reweight, q))
        dq, dk, dv = lssar_bwd(dout, q, k, v, band, saved, reweight)
        return dq, dk, dv.to(v.dtype), None, None

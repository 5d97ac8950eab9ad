"""Row quantities of LSSA and LSSAR: logit scale, mean and threshold (arXiv:2501.13428).

N_i, the number of keys that query i sees, scales its scores: c_i = ln(head_dim) ln(N_i). With f_ij
= softplus(c_i cos(q_i, k_j)) over those keys, LSSAR compares f_ij with

    mu_i = o_i / N_i sum_j f_ij,

where o_i is 0 in the first `exempt_rows` rows of a document and 1 elsewhere; LSSA has mu_i = 0.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import TensorNotes, wide_dtype
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.tile_ranges import (
    TABLES_KEPT,
    DeviceStream,
    Indices,
    device_stream,
    indices_of,
    on_device,
    send,
)

# Lower bound of a squared norm. The paper does not treat zero vectors; here they stay zero.
LEAST_SQUARE = 1e-12
# Greatest difference, in units in the last place, of maximum and mean in a row of equal scores.
FLAT_ULPS = 64


@dataclass(frozen=True, kw_only=True)
class Reweight:
    """Sharpening that turns LSSA into LSSAR.

    power: p > 0 of relu(f - mu)^p; below 1 the gradient is unbounded at mu. exempt_rows: the first
    rows of a document, whose mu is 0.
    """

    power: float = 15.0
    exempt_rows: int = 3


# N_i of each band, by its queries: layers share their token numbers.
_COUNTS = TensorNotes()


class Band(NamedTuple):
    """Queries and keys by global token number, int64 on the CPU: lo <= k <= q is visible.

    q_idx `[s_q]`, k_idx `[s_k]`. q_lo `[s_q]`: the first token of each query's document.
    """

    q_idx: Tensor
    q_lo: Tensor
    k_idx: Tensor

    @property
    def counts(self) -> Tensor:
        """Return N_i: keys of the whole sequence that each query sees, int64 `[s_q]`."""
        starts = indices_of(self.q_lo)
        return _COUNTS.find(self.q_idx, starts, lambda: self.q_idx - self.q_lo + 1)


class Threshold(NamedTuple):
    """Mean that scores of a row are compared with, and the factor that scales its maximum to 1.

    Both `[b, h, s]`. A row with inverse = 0 has nothing above its mean.
    """

    mean: Tensor
    inverse: Tensor


class RowResults(NamedTuple):
    """Rows over all keys: out, slope (e / gamma) `[b, s, h, d]`; mean, gamma `[b, h, s]`."""

    out: Tensor
    slope: Tensor | None
    mean: Tensor
    gamma: Tensor

    def narrowed(self, dtype: torch.dtype) -> "RowResults":
        """Return the results with out and slope in `dtype`."""
        slope = None if self.slope is None else self.slope.to(dtype)
        return self._replace(out=self.out.to(dtype), slope=slope)


def exponent(reweight: Reweight | None) -> float:
    """Return the power of relu(f - mu): 1 for LSSA."""
    return 1.0 if reweight is None else reweight.power


def directions(x: Tensor, rotary: Rotary | None, positions: Tensor) -> Tensor:
    """Return x / |x| over head_dim, then rotated: `[b, s, h, d]`, at least fp32; differentiable.

    The rotation comes last, so a rotary's attention factor scales the score.
    """
    x = x.to(wide_dtype(x.dtype))
    x = x * x.square().sum(-1, keepdim=True).clamp_min(LEAST_SQUARE).rsqrt()
    return x if rotary is None else rotary.rotate(x, positions)


def logit_scales(counts: Tensor, softmax_scale: float | None, like: Tensor) -> Tensor:
    """Return c_i `[s, 1, 1]`, to multiply with queries like `like` `[b, s, h, d]`.

    counts: N_i, int64 `[s]`. softmax_scale: replaces ln(head_dim).
    """
    factor = math.log(like.shape[3]) if softmax_scale is None else softmax_scale
    return (factor * _counts_on_device(counts, like).double().log())[:, None, None].to(like.dtype)


def kernel_logit_scales(counts: Tensor, softmax_scale: float | None, like: Tensor) -> Tensor:
    """Return c_i log2(e), fp32 `[s]` on the device of `like`; made once for equal arguments.

    Arguments as of `logit_scales`. Kernels take scores in base 2.
    """
    factor = math.log(like.shape[3]) if softmax_scale is None else softmax_scale
    return _scales_on_device(indices_of(counts), factor / math.log(2), device_stream(like))


@lru_cache(maxsize=TABLES_KEPT)
def _scales_on_device(counts: Indices, factor: float, place: DeviceStream) -> Tensor:
    """Return factor ln(counts) as an fp32 tensor on the device."""
    return send((factor * counts.values.double().log()).float(), place)


def mean_shares(counts: Tensor, reweight: Reweight | None, like: Tensor) -> Tensor:
    """Return o_i / N_i `[s]` on the device of `like`, in the wider of fp32 and its dtype.

    reweight: None means LSSA, where o_i = 0.
    """
    if reweight is None:
        return torch.zeros(len(counts), dtype=wide_dtype(like.dtype), device=like.device)
    counts = _counts_on_device(counts, like)
    return (counts.double().reciprocal() * (counts > reweight.exempt_rows)).to(
        wide_dtype(like.dtype)
    )


def _counts_on_device(counts: Tensor, like: Tensor) -> Tensor:
    """Return the counts on the device of `like`, from a cache by value."""
    return on_device(indices_of(counts), device_stream(like)) if like.is_cuda else counts


def row_threshold(total: Tensor, top: Tensor, shares: Tensor) -> Threshold:
    """Return the threshold of rows `[b, h, s]` with the sum and the maximum of softplus scores.

    total: the sums, differentiable. top: the maxima. shares: see `mean_shares`. The factor only
    scales a row, so no gradient passes through it. A row whose maximum equals its mean up to
    rounding is flat: its result is 0.
    """
    mean = total * shares
    spread = (top - mean).detach()
    flat = spread <= FLAT_ULPS * torch.finfo(top.dtype).eps * top
    return Threshold(mean, spread.masked_fill(flat, torch.inf).reciprocal())


def no_threshold(like: Tensor) -> Threshold:
    """Return LSSA's threshold for queries like `like` `[b, s, h, d]`: mean 0, factor 1."""
    shape = (like.shape[0], like.shape[2], like.shape[1])
    options = {"dtype": wide_dtype(like.dtype), "device": like.device}
    return Threshold(torch.zeros(shape, **options), torch.ones(shape, **options))

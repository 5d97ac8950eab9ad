"""What LSSA and LSSAR say of a row before any score is known, and of its mean (arXiv:2501.13428).

N_i, the number of keys that query i sees, scales its scores: c_i = ln(head_dim) ln(N_i). With
f_ij = softplus(c_i cos(q_i, k_j)) over those keys, LSSAR compares f_ij with

    mu_i = o_i / N_i sum_j f_ij,

o_i being 0 in the first `exempt_rows` rows of a document and 1 elsewhere; LSSA has mu_i = 0.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.tile_ranges import Indices, device_stream, on_device

# Of a squared norm. The paper says nothing of zero vectors; here they stay zero.
LEAST_SQUARE = 1e-12
# Units in the last place by which the greatest score of a row of equal ones may miss their mean.
FLAT_ULPS = 64


@dataclass(frozen=True, kw_only=True)
class Reweight:
    """The sharpening that makes LSSA into LSSAR.

    power: p > 0 of relu(f - mu)^p; below 1 the gradient is unbounded at mu. exempt_rows: the first
    rows of a document, whose mu is 0.
    """

    power: float = 15.0
    exempt_rows: int = 3


class Band(NamedTuple):
    """Queries and keys by global token number, int64 on the CPU: lo <= k <= q is visible.

    q_idx `[s_q]`, k_idx `[s_k]`; q_lo `[s_q]`: the first token of each query's document.
    """

    q_idx: Tensor
    q_lo: Tensor
    k_idx: Tensor

    @property
    def counts(self) -> Tensor:
        """N_i: how many keys of the whole sequence each query sees, int64 `[s_q]`."""
        return self.q_idx - self.q_lo + 1


class Threshold(NamedTuple):
    """What a score of a row is compared with, and the factor that brings the row's greatest to 1.

    Both `[b, h, s]`; a row with inverse = 0 has nothing above its mean.
    """

    mean: Tensor
    inverse: Tensor


class Finished(NamedTuple):
    """Rows over all their keys: out, slope (e / gamma) `[b, s, h, d]`; mean, gamma `[b, h, s]`."""

    out: Tensor
    slope: Tensor | None
    mean: Tensor
    gamma: Tensor


def exponent(reweight: Reweight | None) -> float:
    """The power of relu(f - mu): that of `reweight`, 1 for LSSA."""
    return 1.0 if reweight is None else reweight.power


def directions(x: Tensor, rotary: Rotary | None, positions: Tensor) -> Tensor:
    """x / |x| over head_dim, then rotated; `[b, s, h, d]` in the wider of fp32 and x.dtype.

    Differentiable. Rotated last, so that a rotary's attention factor scales the score.
    """
    x = x.to(wide_dtype(x.dtype))
    x = x * x.square().sum(-1, keepdim=True).clamp_min(LEAST_SQUARE).rsqrt()
    return x if rotary is None else rotary.rotate(x, positions)


def logit_scales(counts: Tensor, softmax_scale: float | None, like: Tensor) -> Tensor:
    """c_i for queries like `like` `[b, s, h, d]`, to be multiplied with them: `[s, 1, 1]`.

    counts: N_i, int64 `[s]`. softmax_scale: in the place of ln(head_dim).
    """
    factor = math.log(like.shape[3]) if softmax_scale is None else softmax_scale
    return (factor * _moved(counts, like).double().log())[:, None, None].to(like.dtype)


def mean_shares(counts: Tensor, reweight: Reweight | None, like: Tensor) -> Tensor:
    """o_i / N_i, `[s]`, on the device of `like` in the wider of fp32 and its dtype.

    None stands for LSSA, which has o_i = 0.
    """
    if reweight is None:
        return torch.zeros(len(counts), dtype=wide_dtype(like.dtype), device=like.device)
    counts = _moved(counts, like)
    return (counts.double().reciprocal() * (counts > reweight.exempt_rows)).to(
        wide_dtype(like.dtype)
    )


def _moved(counts: Tensor, like: Tensor) -> Tensor:
    """The counts on the device of `like`, where they are kept by value: no wait, no second copy."""
    return on_device(Indices(counts), device_stream(like)) if like.is_cuda else counts


def row_threshold(total: Tensor, top: Tensor, shares: Tensor) -> Threshold:
    """The threshold of rows `[b, h, s]` whose softplus scores sum to `total`, greatest `top`.

    shares: see `mean_shares`. Differentiable in `total`; the factor only scales a row, so no
    gradient passes through it. A row whose greatest score is its mean, up to rounding, is flat:
    its result is 0.
    """
    mean = total * shares
    spread = (top - mean).detach()
    flat = spread <= FLAT_ULPS * torch.finfo(top.dtype).eps * top
    return Threshold(mean, spread.masked_fill(flat, torch.inf).reciprocal())


def no_threshold(like: Tensor) -> Threshold:
    """LSSA's, for queries like `like` `[b, s, h, d]`: every score is taken as it is."""
    shape = (like.shape[0], like.shape[2], like.shape[1])
    words = {"dtype": wide_dtype(like.dtype), "device": like.device}
    return Threshold(torch.zeros(shape, **words), torch.ones(shape, **words))

"""LSSA and LSSAR, dense and readable: the reference of the other implementations.

With f_ij = softplus(c_i cos(q_i, k_j)) over the visible keys (`rows` defines c_i and mu_i),

    LSSA   out_i = sum_j f_ij v_j / sum_j f_ij
    LSSAR  out_i = sum_j relu(f_ij - mu_i)^p v_j / sum_j relu(f_ij - mu_i)^p

(arXiv:2501.13428). The paper normalises LSSAR twice by L1 norms, relu(N_i f_ij / sum_j f_ij -
o_i)^p divided by its row sum, which equals this up to a common factor. Rows may be scaled freely,
so each is scaled to a greatest relu(f - mu) of 1. That neither overflows nor needs the eps of
published implementations. A row with nothing above its mean gives 0. Suffixes: B batch, S queries,
T keys, H query heads, D head_dim.
"""

import torch
from torch import Tensor

from lcdist_kernels.common import check_self, document_starts
from lcdist_kernels.lssar.rows import (
    Reweight,
    Threshold,
    directions,
    exponent,
    logit_scales,
    mean_shares,
    no_threshold,
    row_threshold,
)
from lcdist_kernels.partial import visible
from lcdist_kernels.rotary import Rotary

SHARPENED = Reweight()


def lssar_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    reweight: Reweight | None = SHARPENED, rotary: Rotary | None = None,
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        q, k, v: not rotated; any float dtype. Sums are in the wider of fp32 and q.dtype.
        reweight: None means LSSA.
        positions: integers `[s]` or `[b, s]`, used by rotary only; default: from 0 in every
            document.
        cu_seqlens: see `document_starts`.
        softmax_scale: replaces ln(head_dim).

    Raises:
        ValueError: shapes do not fit.
    """
    check_self(q, k, v)
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    counts = index - starts + 1
    positions = index - starts if positions is None else positions
    dtype = q.dtype
    q, k = directions(q, rotary, positions), directions(k, rotary, positions)
    q = q * logit_scales(counts, softmax_scale, q)
    scores_BHST = softplus_scores(q, k, visible(index, starts, index).to(q.device))
    threshold = no_threshold(q)
    if reweight is not None:
        shares = mean_shares(counts, reweight, q)
        threshold = row_threshold(scores_BHST.sum(-1), scores_BHST.amax(-1), shares)
    out_BSHD, total_BHS = lssar_block(scores_BHST, v, threshold, reweight)
    return (out_BSHD / divisor(total_BHS)).to(dtype)


def softplus_scores(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Return softplus(q . k), `[b, h, s_q, s_k]`; 0 where `mask` `[s_q, s_k]` is False.

    q `[b, s_q, h, d]`: directions times their logit scales. k `[b, s_k, h_kv, d]`: directions.
    Differentiable.
    """
    k_BTHD = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores_BHST = torch.einsum("bshd,bthd->bhst", q, k_BTHD)
    return torch.logaddexp(scores_BHST, torch.zeros_like(scores_BHST)) * mask


def lssar_block(
    scores: Tensor, v: Tensor, threshold: Threshold, reweight: Reweight | None
) -> tuple[Tensor, Tensor]:
    """Return the sums of w v `[b, s_q, h, d]` and of w `[b, h, s_q]` over a block of keys.

    w = (relu(f - mean) * inverse)^p for softplus scores f `[b, h, s_q, s_k]`; v `[b, s_k, h_kv,
    d]`. The quotient of the sums over all blocks is the result. Differentiable.
    """
    y_BHST = (scores - threshold.mean[..., None]).relu() * threshold.inverse[..., None]
    # A power below 1 has no finite derivative at 0; here it is taken as 0.
    none = y_BHST == 0
    weights_BHST = y_BHST.masked_fill(none, 1.0).pow(exponent(reweight)).masked_fill(none, 0.0)
    v_BTHD = v.to(scores.dtype).repeat_interleave(scores.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhst,bthd->bshd", weights_BHST, v_BTHD), weights_BHST.sum(-1)


def divisor(total: Tensor) -> Tensor:
    """Return sums of weights `[b, h, s]` as divisors `[b, s, h, 1]`; 1 for an empty row."""
    return total.masked_fill(total == 0, 1.0).transpose(1, 2)[..., None]

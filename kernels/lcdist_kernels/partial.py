"""Partial results of softmax attention: visible keys, and the merge of two partials.

A partial is (out, lse) over some of the keys; lse = log sum exp(score). For two disjoint key sets,

    lse = log(exp(lse_1) + exp(lse_2)),   out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

(online softmax, arXiv:1805.02867). A query that sees no key has lse = -inf and out = 0.
"""

import torch
from torch import Tensor

from lcdist_kernels.common import TensorNotes


def visible(q_idx: Tensor, q_lo: Tensor, k_idx: Tensor) -> Tensor:
    """Return the mask of causal attention within documents: bool `[s_q, s_k]`.

    True where q_lo <= k_idx <= q_idx. q_idx, k_idx: global token numbers. q_lo: the first token of
    each query's document.
    """
    return (k_idx <= q_idx[:, None]) & (k_idx >= q_lo[:, None])


def reaches(q_idx: Tensor, q_lo: Tensor, k_idx: Tensor) -> bool:
    """Return False if the smallest and largest numbers show that no query sees any key."""
    (first, last), (lowest, _), (_, highest) = map(_extremes, (k_idx, q_lo, q_idx))
    return first <= highest and last >= lowest


_EXTREMES = TensorNotes()


def _extremes(x: Tensor) -> tuple[int, int]:
    """Return the smallest and the largest number, read once for all layers."""
    return _EXTREMES.find(x, None, lambda: (int(x.min()), int(x.max())))


def merge(out: Tensor, lse: Tensor, out_blk: Tensor, lse_blk: Tensor) -> tuple[Tensor, Tensor]:
    """Return the partial over the keys of both, differentiable also where a query sees nothing.

    out, out_blk: `[b, s, h, d]`, of any dtype; lse, lse_blk: `[b, h, s]`, both fp32 or float64, as
    are the results.
    """
    # The maximum only shifts the exponents, so no gradient passes through it.
    top = torch.maximum(lse, lse_blk).detach()
    top = top.masked_fill(top == -torch.inf, 0.0)
    weight, weight_blk = (lse - top).exp(), (lse_blk - top).exp()
    total, lse = normalizer(weight + weight_blk, top)
    weight, weight_blk = weight / total, weight_blk / total
    # [b, h, s] -> [b, s, h, 1]
    out = out * weight.transpose(1, 2)[..., None] + out_blk * weight_blk.transpose(1, 2)[..., None]
    return out, lse


def finish_softmax_(out: Tensor, top: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise accumulated rows in place and return (out, lse); 0 and -inf for an empty row.

    out `[..., d]`: sum of exp(score - top) times values. top, total `[..., 1]`: the greatest score
    and the sum of weights. lse is `[..., 1]`. `total` is overwritten. Without gradients.
    """
    lse = top + total.log()
    return out.div_(total.masked_fill_(total == 0, 1.0)), lse


def normalizer(total: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Return the divisor and the lse of rows whose weights exp(score - top) sum to `total`.

    A row that sees nothing (total = 0) gets (1, -inf), with gradients of zero rather than NaN.
    """
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    return total, (top + total.log()).masked_fill(empty, -torch.inf)

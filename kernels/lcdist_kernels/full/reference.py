"""Full causal attention, dense and readable: the reference of the other implementations.

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j   over lo_i <= j <= i,

where lo_i is the first token of i's document (arXiv:1706.03762, eq. 1, with a causal mask).
Suffixes: B batch, S queries, T keys, H query heads, D head_dim.
"""

import torch
from torch import Tensor

from lcdist_kernels.common import check_self, resolve_scale, wide_dtype
from lcdist_kernels.partial import normalizer, visible
from lcdist_kernels.rotary import Rotary, rotate_self


def full_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    rotary: Rotary | None = None, positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        q, k, v: not rotated; any float dtype. Sums are in the wider of fp32 and q.dtype.
        positions: integers `[s]` or `[b, s]`, used by rotary only; default: from 0 in every
            document.
        cu_seqlens: see `document_starts`.
        softmax_scale: default head_dim ** -0.5.

    Raises:
        ValueError: shapes do not fit.
    """
    check_self(q, k, v)
    q, k, index, starts = rotate_self(q, k, rotary, positions, cu_seqlens)
    scores_BHST, v_BTHD = _scores(q, k, v, resolve_scale(softmax_scale, q.shape[3]))
    mask = visible(index, starts, index).to(q.device)
    weights_BHST = scores_BHST.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights_BHST, v_BTHD).to(q.dtype)


def full_partial(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the partial (out `[b, s_q, h, d]`, lse `[b, h, s_q]`) over the keys visible in `mask`.

    q `[b, s_q, h, d]`, k, v `[b, s_k, h_kv, d]`, rotated. mask: bool `[s_q, s_k]`, or one that
    broadcasts to `[b, h, s_q, s_k]`; rows may be empty. The result is in the wider of fp32 and
    q.dtype; differentiable.
    """
    scores_BHST, v_BTHD = _scores(q, k, v, softmax_scale)
    scores_BHST = scores_BHST.masked_fill(~mask, -torch.inf)
    top_BHS = scores_BHST.amax(-1).detach()
    top_BHS = top_BHS.masked_fill(top_BHS == -torch.inf, 0.0)
    weights_BHST = (scores_BHST - top_BHS[..., None]).exp()
    total_BHS, lse_BHS = normalizer(weights_BHST.sum(-1), top_BHS)
    out_BSHD = torch.einsum("bhst,bthd->bshd", weights_BHST / total_BHS[..., None], v_BTHD)
    return out_BSHD, lse_BHS


def _scores(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Return scaled scores `[b, h, s_q, s_k]` and v with one head for each query head."""
    group = q.shape[2] // k.shape[2]
    wide = wide_dtype(q.dtype)
    k_BTHD = k.to(wide).repeat_interleave(group, dim=2)
    v_BTHD = v.to(wide).repeat_interleave(group, dim=2)
    return torch.einsum("bshd,bthd->bhst", q.to(wide), k_BTHD) * softmax_scale, v_BTHD

"""Full causal attention, dense and readable: the truth that the other implementations meet.

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j   over lo_i <= j <= i,

lo_i being the first token of i's document (arXiv:1706.03762, eq. 1, with a causal mask).
Suffixes: B batch, S queries, T keys, H query heads, D head_dim.
"""

import torch
from torch import Tensor

from lcdist_kernels.common import check_self, document_starts, wide_dtype
from lcdist_kernels.partial import normalizer, visible
from lcdist_kernels.rotary import Rotary


def full_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    rotary: Rotary | None = None, positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, un-rotated; out is like q.

    positions: integers `[s]` or `[b, s]`, used by rotary alone; default: from 0 in every document.
    cu_seqlens: see `document_starts`. softmax_scale: default head_dim ** -0.5. Any float dtype;
    sums in the wider of fp32 and q.dtype. Raises ValueError where shapes do not fit.
    """
    check_self(q, k, v)
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    if rotary is not None:
        positions = index - starts if positions is None else positions
        q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    scores_BHST, v_BTHD = _scores(q, k, v, scale)
    mask = visible(index, starts, index).to(q.device)
    weights_BHST = scores_BHST.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights_BHST, v_BTHD).to(q.dtype)


def full_partial(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The partial (out `[b, s_q, h, d]`, lse `[b, h, s_q]`) over the keys that `mask` lets through.

    q `[b, s_q, h, d]`, k, v `[b, s_k, h_kv, d]`, rotated; mask: bool `[s_q, s_k]`, a row may be
    empty. Result in the wider of fp32 and q.dtype; differentiable.
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
    group = q.shape[2] // k.shape[2]
    wide = wide_dtype(q.dtype)
    k_BTHD = k.to(wide).repeat_interleave(group, dim=2)
    v_BTHD = v.to(wide).repeat_interleave(group, dim=2)
    return torch.einsum("bshd,bthd->bhst", q.to(wide), k_BTHD) * softmax_scale, v_BTHD

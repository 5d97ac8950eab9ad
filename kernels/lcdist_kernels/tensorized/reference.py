"""Tensorized (lexicographic) attention, dense and readable: the reference of the others.

Based on arXiv:2410.20926, interpreted fibre by fibre and made causal. The paper's own masks are not
public, so this is our operator without a claim of parity. With S_j = softmax_scale rot_j(q)
rot_j(k)^T and U_0 = v, every mode but the coarsest makes a hop over whole fibres, and every mode
has a branch over the past of its fibre. One softmax runs over all branches of a query:

    U_j = softmax(S_j | fibre of mode j) U_{j-1}
    w = softmax over all j and s of (S_j + bias_j | branch j),   out = sum_j w_j U_{j-1}

Branch j of a token reads keys whose first differing digit from the top is j, and smaller: each
stands for s_j tokens, all of them past. Branch 1 is causal attention inside a finest block (or the
last `local_blocks` of them) and, as s_1 = 1, has bias 0. Suffixes: B batch, S queries, T keys, H
query heads, D head_dim.
"""

import torch
from torch import Tensor

from lcdist_kernels.common import check_self, document_starts, resolve_scale, wide_dtype
from lcdist_kernels.full import full_partial
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.tensorized.grid import ModeGrid, check_bias, initial_bias


def tensorized_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    grid: ModeGrid, branch_bias: Tensor | None = None, rotary: Rotary | None = None,
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        q, k, v: not rotated; any float dtype. Sums are in the wider of fp32 and q.dtype.
        branch_bias: `[len(modes), h]`; default: log strides.
        positions: integers `[s]` or `[b, s]`, used by rotary only (with pe = "mode", their digits);
            default: from 0 in every document.
        cu_seqlens: see `document_starts`; any borders.
        softmax_scale: default head_dim ** -0.5.

    Raises:
        ValueError: shapes do not fit.
    """
    check_self(q, k, v)
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    offset = index - starts
    positions = offset if positions is None else positions
    scale = resolve_scale(softmax_scale, q.shape[3])
    bias = initial_bias(grid.modes, q.shape[2]) if branch_bias is None else branch_bias
    check_bias(bias, grid, q.shape[2])
    bias = bias.to(q.device, wide_dtype(q.dtype))
    same = starts[:, None] == starts[None]

    logits_BHST = torch.full((), -torch.inf, dtype=bias.dtype, device=q.device)
    values, masks, u_BTHD = [], [], v.to(bias.dtype)
    for mode in range(len(grid.modes) + 1):
        q_mode = rotate_mode(q, rotary, positions, grid, mode)
        k_mode = rotate_mode(k, rotary, positions, grid, mode)
        mask_ST = (grid.branch_mask(offset, offset, mode) & same).to(q.device)
        scores_BHST = _scores(q_mode, k_mode, scale)
        if mode:
            scores_BHST = scores_BHST + bias[mode - 1, :, None, None]
        logits_BHST = torch.where(mask_ST, scores_BHST, logits_BHST)
        values.append(_per_query_head(u_BTHD, q))
        masks.append(mask_ST)
        if mode < len(grid.modes):
            fibre_ST = (grid.hop_mask(offset, offset, mode) & same).to(q.device)
            u_BTHD = dense_hop(q_mode, k_mode, u_BTHD, fibre_ST, scale, grid)
    weights_BHST = logits_BHST.softmax(-1)
    out = torch.zeros((), dtype=bias.dtype, device=q.device)
    for mask_ST, u_BTHD in zip(masks, values, strict=True):
        out = out + torch.einsum("bhst,bthd->bshd", weights_BHST * mask_ST, u_BTHD)
    return out.to(q.dtype)


def rotate_mode(
    x: Tensor, rotary: Rotary | None, positions: Tensor, grid: ModeGrid, mode: int
) -> Tensor:
    """Rotate queries or keys `[b, s, h, d]` at `positions` as `mode` does."""
    return x if rotary is None else rotary.rotate(x, grid.angle(positions, mode))


def dense_hop(
    q: Tensor, k: Tensor, u: Tensor, mask: Tensor, softmax_scale: float, grid: ModeGrid
) -> Tensor:
    """Return U_j of rotated q, k and u = U_{j-1}, at least fp32; differentiable.

    u has as many heads as k or, with hop_heads = "q", possibly as many as q. mask: bool `[s_q,
    s_k]`, the fibres. The result has as many heads as q ("q") or k ("kv").
    """
    q = q.to(wide_dtype(q.dtype))
    if grid.hop_heads == "kv":
        q = q.unflatten(2, (k.shape[2], -1)).mean(3)
    nheads = q.shape[2]
    k = k.to(q.dtype).repeat_interleave(nheads // k.shape[2], 2)
    u = u.to(q.dtype).repeat_interleave(nheads // u.shape[2], 2)
    return full_partial(q, k, u, mask, softmax_scale)[0]


def _per_query_head(u: Tensor, q: Tensor) -> Tensor:
    """Repeat the heads of u for each query head."""
    return u.repeat_interleave(q.shape[2] // u.shape[2], 2)


def _scores(q: Tensor, k: Tensor, softmax_scale: float) -> Tensor:
    """Return scaled scores `[b, h, s_q, s_k]`."""
    wide = wide_dtype(q.dtype)
    k_BTHD = _per_query_head(k.to(wide), q)
    return torch.einsum("bshd,bthd->bhst", q.to(wide), k_BTHD) * softmax_scale

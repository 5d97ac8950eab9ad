"""Attention of single queries over a cache in torch: what the kernels are tested against.

All scores of a query fit in memory, so this is the implementation on a CPU as well. A key head is
read once for all query heads that share it, and nothing is copied for that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype


def decode_reference(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    spans: Sequence[tuple[int, int, int]],
    softmax_scale: float,
    step: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the partials of single queries, in the wider of fp32 and q.dtype.

    The arguments are those of `launch.decode_fwd`.
    """
    wide = wide_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
    for i, (row, first, count) in enumerate(spans):
        if not count:
            continue
        entries = slice(first, first + (count - 1) * step + 1, step)
        keys, values = k[row, entries].to(wide), u[row, entries].to(wide)
        queries = q[i].to(wide).view(k.shape[2], -1, q.shape[2]) * softmax_scale
        scores = torch.bmm(queries, keys.permute(1, 2, 0)).view(u.shape[2], -1, count)
        row_lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(row_lse).exp_()
        out[i] = torch.bmm(weights, values.transpose(0, 1)).view(q.shape[1:])
        lse[i] = row_lse.flatten()
    return out, lse


def decode_blocks_reference(
    q: Tensor, table: Tensor, ids: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the partials of single queries over listed blocks with landmarks.

    The arguments are those of `launch.decode_blocks`; the results are in the wider of fp32 and
    q.dtype.
    """
    wide = wide_dtype(q.dtype)
    by_head = q.to(wide).unflatten(1, (ids.shape[1], -1)) * softmax_scale
    blocks = table[ids.clamp_min(0).long()].to(wide)  # [r, h_kv, K, 2, L, d]
    keys, values = blocks.unbind(3)
    scores = by_head @ keys.flatten(2, 3).transpose(2, 3)
    scores = scores.unflatten(-1, (ids.shape[2], -1))  # [r, h_kv, g, K, L]
    gates = scores[..., -1].masked_fill((ids < 0)[:, :, None], -torch.inf)
    lse = gates.logsumexp(-1)
    weights = (gates - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    inner = scores[..., :-1].softmax(-1) * weights[..., None]
    out = inner.flatten(3, 4) @ values[..., :-1, :].flatten(2, 3)
    return out.flatten(1, 2), lse.flatten(1, 2)

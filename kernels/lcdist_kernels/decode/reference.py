"""Attention of single queries over a cache, dense: the reference of the kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full import full_partial


def decode_reference(
    q: Tensor,
    k: Tensor,
    u: Tensor,
    spans: Sequence[tuple[int, int, int]],
    softmax_scale: float,
    step: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return the partials of single queries; as `launch.decode_fwd`."""
    parts = []
    for i, (row, first, count) in enumerate(spans):
        # A row that reads nothing has one entry, which the mask hides.
        length = max(1, count)
        entries = slice(first, first + length * step, step)
        k_row, u_row = (x[row : row + 1, entries][:, :length] for x in (k, u))
        k_row = k_row.repeat_interleave(u.shape[2] // k.shape[2], 2)
        mask = (torch.arange(length, device=q.device) < count)[None]
        parts.append(full_partial(q[i : i + 1, None], k_row, u_row, mask, softmax_scale))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs)[:, 0], torch.cat(lses)[..., 0]


def decode_blocks_reference(
    q: Tensor, table: Tensor, ids: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the partials of single queries over listed blocks; as `launch.decode_blocks`."""
    wide = wide_dtype(q.dtype)
    rows, nheads_kv, _ = ids.shape
    by_head = q.to(wide).unflatten(1, (nheads_kv, -1))
    keys, values = table.to(wide)[ids.clamp_min(0).long()].unbind(3)  # [r, h_kv, K, L, d]
    scores = torch.einsum("rhgd,rhkld->rhgkl", by_head, keys) * softmax_scale
    gates = scores[..., -1].masked_fill((ids < 0)[:, :, None], -torch.inf)
    inner = scores[..., :-1].softmax(-1)
    blocks = torch.einsum("rhgkl,rhkld->rhgkd", inner, values[..., :-1, :])
    lse = gates.logsumexp(-1)
    weights = (gates - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = torch.einsum("rhgk,rhgkd->rhgd", weights, blocks)
    return out.flatten(1, 2), lse.flatten(1, 2).reshape(rows, -1)

"""Checks and small functions that several attention methods use."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lcdist.attention.shape import HeadSlice, Shape
from lcdist.exchange import Group, group_size
from lcdist.layout import ContextLayout
from lcdist_kernels.common import check_qkv, document_starts


def tokens(layout: ContextLayout, rank: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the global positions of a rank's tokens, and the first token of each one's document.

    Both are int64 `[local_seqlen]` on the CPU. For methods without an `AttentionContext`.
    """
    token_ids = layout.positions(rank)
    return token_ids, document_starts(cu_seqlens, token_ids, layout.seqlen)


def check_shard(q: Tensor, k: Tensor, layout: ContextLayout, group: Group) -> None:
    """Raise ValueError unless q and k are one rank's shard and `group` has the layout's size."""
    if group_size(group) != layout.cp_size:
        raise ValueError(
            f"the layout is for cp_size = {layout.cp_size}, the group has {group_size(group)} ranks"
        )
    if not q.shape[1] == k.shape[1] == layout.local_seqlen:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k, v have {k.shape[1]}: this layout gives every rank "
            f"{layout.local_seqlen} of {layout.seqlen}"
        )


def check_plain(
    q: Tensor,
    k: Tensor,
    params: Mapping[str, Tensor] | None,
    heads: HeadSlice | None,
    method: str,
) -> None:
    """Raise ValueError if `params` are given, or as `held_heads`.

    For methods without an `AttentionContext` that have no learnable parameters.
    """
    if params:
        raise ValueError(f"params = {sorted(params)}: {method} attention has no learnable extras")
    held_heads(heads, q, k)


def held_heads(heads: HeadSlice | None, q: Tensor, k: Tensor) -> HeadSlice:
    """Return the position of q's and k's heads in the model; None stands for all heads.

    Raises ValueError if the model has fewer heads, or if q's and k's heads do not pair as the
    model's do.
    """
    held, held_kv = q.shape[2], k.shape[2]
    if heads is None:
        return HeadSlice(0, held, 0, held_kv)
    group = max(1, heads.nheads // max(1, heads.nheads_kv))
    fits = heads.nheads == group * heads.nheads_kv
    fits &= 0 <= heads.first <= heads.nheads - held and heads.first_kv == heads.first // group
    # A whole number of groups, or a part of one.
    fits &= held == group * held_kv or (held_kv == 1 and (heads.first % group) + held <= group)
    if not fits:
        raise ValueError(
            f"{heads} for q with {held} heads and k with {held_kv}: first and first_kv number the "
            "heads of the whole model, which has nheads and nheads_kv of them"
        )
    return heads


DecodeRow = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(q, k, v, positions) -> out, with positions `[n]` and the cache cut after the greatest one."""


def decode_rows(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, decode_row: DecodeRow
) -> Tensor:
    """Apply `decode_row` to the filled part of a cache, row by row if positions are `[b, n]`.

    Args:
        q: the new tokens, `[b, n, h, d]`.
        k_cache, v_cache: `[b, s_cache, h_kv, d]`.
        positions: integers on the CPU, `[n]` or `[b, n]`.

    Raises:
        ValueError: shapes do not fit, or a position lies outside the cache.
    """
    check_qkv(q, k_cache, v_cache)
    if positions.shape not in (q.shape[1:2], q.shape[:2]):
        raise ValueError(
            f"positions of shape {tuple(positions.shape)}: expected [{q.shape[1]}] or "
            f"{list(q.shape[:2])}"
        )
    if positions.min() < 0 or positions.max() >= k_cache.shape[1]:
        raise ValueError(
            f"positions from {int(positions.min())} to {int(positions.max())}: "
            f"the cache has entries 0 to {k_cache.shape[1] - 1}"
        )
    if positions.dim() == 1:
        filled = int(positions.max()) + 1
        return decode_row(q, k_cache[:, :filled], v_cache[:, :filled], positions)
    rows = zip(q.split(1), k_cache.split(1), v_cache.split(1), positions, strict=True)
    return torch.cat([decode_rows(*row, decode_row) for row in rows])


def causal_flops(shape: Shape) -> int:
    """Count forward operations of one layer: 4 head_dim per visible pair, s (s + 1) / 2 pairs.

    Raises ValueError without shape.seqlen.
    """
    if shape.seqlen is None:
        raise ValueError(f"{shape}: seqlen is needed to count operations")
    pairs = shape.seqlen * (shape.seqlen + 1) // 2
    return 4 * shape.batch * shape.nheads * shape.head_dim * pairs

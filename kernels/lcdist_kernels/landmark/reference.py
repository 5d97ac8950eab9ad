"""Landmark attention, dense and readable: the truth that the other implementations meet.

With s_ij = softmax_scale q_i . k_j, blocks b of L tokens, their landmarks m(b) being the last, and
query i in block B (arXiv:2305.16300):

    gate     g_i = softmax of s_ij over the j <= i of block B but m(B), and over m(b), b < B
    inside   r_ib = softmax of s_ij over the j of block b but m(b)
    out_i  = sum_j g_ij v_j  +  sum_b g_i,m(b) sum_j r_ib,j v_j

A landmark is never seen in its own block, not even by itself, and its value has no weight. With
top_k, the b are those that `choose_blocks` chose for i's unit, and the gate is over these alone.
Suffixes: B batch, S queries, N blocks, L tokens of a block, H query heads, K key heads, D head_dim.
"""

import torch
from torch import Tensor

from lcdist_kernels.common import check_self, document_starts, wide_dtype
from lcdist_kernels.landmark.blocks import (
    QueryRows,
    block_grid,
    block_starts,
    landmarks,
    unit_lengths,
)
from lcdist_kernels.landmark.top_k import choose_blocks
from lcdist_kernels.partial import normalizer, visible
from lcdist_kernels.rotary import Rotary


def landmark_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    block_size: int, top_k: int | None = None, select_tokens: int = 1, rotary: Rotary | None = None,
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, un-rotated; out is like q.

    block_size: tokens of a block, its landmark, the last, included. top_k: past blocks that a unit
    of select_tokens tokens reads; None: all. positions: integers `[s]` or `[b, s]`, used by rotary
    alone; default: from 0 in every document. cu_seqlens: see `document_starts`; blocks are counted
    from the beginning of every document, whose last may be short and has no landmark then.
    softmax_scale: default head_dim ** -0.5. Any float dtype; sums in the wider of fp32 and
    q.dtype. Raises ValueError where shapes do not fit.
    """
    check_self(q, k, v)
    check_sizes(block_size, top_k, select_tokens)
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    if rotary is not None:
        positions = index - starts if positions is None else positions
        q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    rows, num_slots = grid = block_grid(cu_seqlens, q.shape[1], block_size)
    k, v = grid.to_slots(k), grid.to_slots(v)
    read = None
    if top_k is not None:
        lengths = unit_lengths(index, starts, select_tokens)
        keys = landmarks(k, block_size)
        chosen = choose_blocks(q, keys, rows, lengths, top_k, scale)
        read = read_by_rows(chosen, lengths, keys.shape[1], q.shape[2])
    k_start = block_starts(num_slots, block_size)
    return landmark_partial(q, k, v, rows, k_start, scale, read)[0].to(q.dtype)


def check_sizes(block_size: int, top_k: int | None, select_tokens: int) -> None:
    """Raises ValueError for a block without content, or counts below 1."""
    if block_size < 2:
        raise ValueError(
            f"block_size = {block_size}: a block holds its landmark and one more token at least; "
            "use 2 or more"
        )
    if (top_k is not None and top_k < 1) or select_tokens < 1:
        raise ValueError(
            f"top_k = {top_k}, select_tokens = {select_tokens}: use 1 or more "
            "(top_k = None reads every past block)"
        )


def read_by_rows(chosen: Tensor, lengths: Tensor, num_blocks: int, nheads: int) -> Tensor:
    """Which of num_blocks blocks each row reads, bool `[b, h, s, n]`, of what its unit chose."""
    numbers = torch.arange(num_blocks, device=chosen.device)
    of_unit = (chosen[..., None] == numbers).any(3)
    of_row = of_unit.repeat_interleave(lengths.to(chosen.device), 2)
    return of_row.repeat_interleave(nheads // chosen.shape[1], 1)


def landmark_partial(
    q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, k_start: Tensor, softmax_scale: float,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The partial (out `[b, s_q, h, d]`, lse `[b, h, s_q]`) over whole blocks of keys.

    q `[b, s_q, h, d]`; k, v `[b, n L, h_kv, d]`, rotated: n blocks that begin at slots k_start.
    read: bool, to be broadcast to `[b, h, s_q, n]`: which past blocks may be read, None: all.
    Result in the wider of fp32 and q.dtype; differentiable.
    """
    wide, size = wide_dtype(q.dtype), rows.block_size
    group = q.shape[2] // k.shape[2]
    k_BNLHD, v_BNLHD = (
        x.to(wide).repeat_interleave(group, dim=2).unflatten(1, (-1, size)) for x in (k, v)
    )
    scores_BHSNL = torch.einsum("bshd,bnlhd->bhsnl", q.to(wide), k_BNLHD) * softmax_scale
    slots = (k_start[:, None] + torch.arange(size)).flatten()
    local_SNL = visible(*rows.content, slots).unflatten(1, (-1, size)).to(q.device)
    past_SN = visible(*rows.past, k_start).to(q.device)
    past = past_SN if read is None else past_SN & read
    weights_BHSNL, lse_BHS = gate(scores_BHSNL, past, local_SNL)
    return torch.einsum("bhsnl,bnlhd->bshd", weights_BHSNL, v_BNLHD), lse_BHS


def sparse_partial(
    q: Tensor,
    kv: Tensor,
    ids: Tensor,
    past: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """The partial over blocks that each row names, of a table `kv` `[m, 2, L, d]`, rotated.

    q `[b, s, h, d]`; ids: rows of the table, `[b, h_kv, s, K]`; past: bool, like ids, whether one
    counts. Result as of `landmark_partial`; differentiable.
    """
    group = q.shape[2] // ids.shape[1]
    named = kv.to(wide_dtype(q.dtype)).index_select(0, ids.flatten().long())
    k_BKSNLD, v_BKSNLD = named.view(*ids.shape, *kv.shape[1:]).unbind(4)
    q_BSKGD = q.to(k_BKSNLD.dtype).unflatten(2, (-1, group))
    scores = torch.einsum("bskgd,bksnld->bkgsnl", q_BSKGD, k_BKSNLD) * softmax_scale
    weights, lse = gate(scores, past[:, :, None], None)
    out = torch.einsum("bkgsnl,bksnld->bskgd", weights, v_BKSNLD)
    return out.flatten(2, 3), lse.flatten(1, 2)


def gate(scores: Tensor, past: Tensor, local: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weights `[..., s, n, l]` of all keys, and lse `[..., s]` of the gate.

    scores: like the weights. past: bool `[..., s, n]`: blocks that are gated by their landmark,
    which is their last token. local: bool `[..., s, n, l]`: keys that stand for themselves.
    """
    logits = scores[..., -1].masked_fill(~past, -torch.inf)
    if local is not None:
        plain = scores.masked_fill(~local, -torch.inf)
        logits = torch.cat((logits, plain.flatten(-2)), -1)
    top = logits.amax(-1).detach()
    # A row that sees nothing: -inf - (-inf) would be NaN.
    top = top.masked_fill(top == -torch.inf, 0.0)
    gates = (logits - top[..., None]).exp()
    total, lse = normalizer(gates.sum(-1), top)
    gates = gates / total[..., None]
    of_blocks = gates[..., : scores.shape[-2], None]
    # The landmark has no weight of its own: 0, as content beside it.
    inside = torch.cat((scores[..., :-1].softmax(-1), torch.zeros_like(scores[..., -1:])), -1)
    weights = of_blocks * inside
    if local is not None:
        weights = weights + gates[..., scores.shape[-2] :].unflatten(-1, scores.shape[-2:])
    return weights, lse

"""Landmark attention, dense and readable: the reference of the other implementations.

With s_ij = softmax_scale q_i . k_j, blocks b of L tokens whose last token m(b) is the landmark, and
query i in block B (arXiv:2305.16300):

    gate     g_i = softmax of s_ij over the j <= i of block B but m(B), and over m(b), b < B
    inside   r_ib = softmax of s_ij over the j of block b but m(b)
    out_i  = sum_j g_ij v_j  +  sum_b g_i,m(b) sum_j r_ib,j v_j

A landmark is not visible in its own block, not even to itself, and its value has no weight. With
top_k, b ranges over the blocks that `choose_blocks` chose for i's unit, in the gate too. Suffixes:
B batch, S queries, N blocks, L tokens of a block, H query heads, K key heads, D head_dim.
"""

import torch
from torch import Tensor

from lcdist_kernels.common import check_self, resolve_scale, wide_dtype
from lcdist_kernels.landmark.blocks import (
    QueryRows,
    block_grid,
    block_starts,
    landmarks,
    unit_lengths,
)
from lcdist_kernels.landmark.top_k import choose_blocks
from lcdist_kernels.partial import normalizer, visible
from lcdist_kernels.rotary import Rotary, rotate_self


def landmark_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    block_size: int, top_k: int | None = None, select_tokens: int = 1, rotary: Rotary | None = None,
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        q, k, v: not rotated; any float dtype. Sums are in the wider of fp32 and q.dtype.
        block_size: tokens of a block, including its landmark, the last one.
        top_k: past blocks that a unit of select_tokens tokens reads; None: all.
        positions: integers `[s]` or `[b, s]`, used by rotary only; default: from 0 in every
            document.
        cu_seqlens: see `document_starts`. Blocks count from the start of every document; its last
            block may be short and then has no landmark.
        softmax_scale: default head_dim ** -0.5.

    Raises:
        ValueError: shapes do not fit.
    """
    check_self(q, k, v)
    check_sizes(block_size, top_k, select_tokens)
    q, k, index, starts = rotate_self(q, k, rotary, positions, cu_seqlens)
    scale = resolve_scale(softmax_scale, q.shape[3])
    grid = block_grid(cu_seqlens, q.shape[1], block_size)
    rows, num_slots = grid.rows, grid.num_slots
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
    """Raise ValueError for a block without content, or counts below 1."""
    if block_size < 2:
        raise ValueError(
            f"block_size = {block_size}: a block holds its landmark and at least one more token; "
            "use 2 or more"
        )
    if (top_k is not None and top_k < 1) or select_tokens < 1:
        raise ValueError(
            f"top_k = {top_k}, select_tokens = {select_tokens}: use 1 or more "
            "(top_k = None reads every past block)"
        )


def read_by_rows(chosen: Tensor, lengths: Tensor, num_blocks: int, nheads: int) -> Tensor:
    """Return which blocks each row reads, bool `[b, h, s, n]`, from the choice of its unit."""
    numbers = torch.arange(num_blocks, device=chosen.device)
    of_unit = (chosen[..., None] == numbers).any(3)
    of_row = of_unit.repeat_interleave(lengths.to(chosen.device), 2)
    return of_row.repeat_interleave(nheads // chosen.shape[1], 1)


def landmark_partial(
    q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, k_start: Tensor, softmax_scale: float,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the partial (out `[b, s_q, h, d]`, lse `[b, h, s_q]`) over whole blocks of keys.

    Args:
        q, k, v: `[b, s_q, h, d]`, `[b, n L, h_kv, d]` twice, rotated.
        k_start: the first slots of the n blocks.
        read: bool, broadcasts to `[b, h, s_q, n]`: past blocks that may be read; None: all.

    The result is in the wider of fp32 and q.dtype; differentiable.
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
    """Return the partial over the blocks that each row names, of a table `kv` `[m, 2, L, d]`.

    Args:
        q: `[b, s, h, d]`, rotated, like the table.
        ids: rows of the table, `[b, h_kv, s, K]`.
        past: bool like ids: whether an entry counts.

    The result is like that of `landmark_partial`; differentiable.
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
    """Return the weights `[..., s, n, l]` of all keys, and lse `[..., s]` of the gate.

    Args:
        scores: like the weights.
        past: bool `[..., s, n]`: blocks gated by their landmark, the last token.
        local: bool `[..., s, n, l]`: keys that are softmax entries of their own.
    """
    logits = scores[..., -1].masked_fill(~past, -torch.inf)
    if local is not None:
        plain = scores.masked_fill(~local, -torch.inf)
        logits = torch.cat((logits, plain.flatten(-2)), -1)
    top = logits.amax(-1).detach()
    # For a row that sees nothing, -inf - (-inf) would be NaN.
    top = top.masked_fill(top == -torch.inf, 0.0)
    gates = (logits - top[..., None]).exp()
    total, lse = normalizer(gates.sum(-1), top)
    gates = gates / total[..., None]
    of_blocks = gates[..., : scores.shape[-2], None]
    # A landmark has no weight of its own in its block.
    inside = torch.cat((scores[..., :-1].softmax(-1), torch.zeros_like(scores[..., -1:])), -1)
    weights = of_blocks * inside
    if local is not None:
        weights = weights + gates[..., scores.shape[-2] :].unflatten(-1, scores.shape[-2:])
    return weights, lse

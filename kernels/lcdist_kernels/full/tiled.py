"""Full causal attention tile by tile in torch: linear memory, gradients written by hand.

With s_ij = softmax_scale q_i . k_j over the visible keys (FlashAttention-2, arXiv:2307.08691):

    p_ij = exp(s_ij - lse_i)            delta_i = sum_d dout_i out_i
    dv_j = sum_i p_ij dout_i            ds_ij = p_ij (dout_i . v_j - delta_i)
    dq_i = softmax_scale sum_j ds_ij k_j        dk_j = softmax_scale sum_i ds_ij q_i

The visible keys of a query are a band over global token numbers, so any cut of the sequence works:
see `tiles`. With `out` and `lse` of the whole row, `full_bwd` returns a block's exact share of the
gradients.
"""

import torch
from torch import Tensor

from lcdist_kernels.partial import finish_softmax_
from lcdist_kernels.tiles import Tile, fold, tile_sides, tiles_of_band, unfold, view_of


def full_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, q_lo: Tensor, k_idx: Tensor,
    softmax_scale: float, *,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the partial (out `[b, s_q, h, d]`, lse `[b, h, s_q]`) of q over a block of keys.

    Args:
        q, k, v: `[b, s_q, h, d]`, `[b, s_k, h_kv, d]` twice; q and k rotated.
        q_idx, k_idx: global token numbers `[s_q]`, `[s_k]`, int64 on the CPU.
        q_lo: the first token of each query's document, like q_idx.
        out_dtype: of out; default, and dtype of lse: the wider of fp32 and q.dtype.

    A query that sees no key has out = 0, lse = -inf.
    """
    batch, seqlen, nheads, head_dim = q.shape
    q, k, v = (fold(x, k.shape[2]) for x in (q, k, v))
    k, v = k.squeeze(1), v.squeeze(1)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
    block_q, block_k, units = tile_sides(q, k)
    scratch = q.new_empty(units * q.shape[1] * block_q * block_k)
    for start, stop, tiles in tiles_of_band(q_idx, q_lo, k_idx, block_q, block_k, q.device):
        for unit in range(0, len(q), units):
            rows = (slice(unit, unit + units), slice(None), slice(start, stop))
            out[rows], lse[rows] = _fwd_rows(
                q[rows] * softmax_scale,
                k[rows[0]],
                v[rows[0]],
                tiles,
                scratch,
            )
    shape = (batch, seqlen, nheads, head_dim)
    return unfold(out, shape).to(out_dtype or out.dtype), lse.view(batch, nheads, seqlen)


def _fwd_rows(
    q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile], scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of some rows `[units, group, rows, d]` over their tiles of keys."""
    units, group, rows, head_dim = q.shape
    q = q.reshape(units, group * rows, head_dim)
    top = q.new_full((units, group * rows, 1), -torch.inf)
    total = torch.zeros_like(top)
    out = torch.zeros_like(q)
    for k_start, k_stop, hidden in tiles:
        scores = view_of(scratch, (units, group * rows, k_stop - k_start))
        torch.bmm(q, k[:, k_start:k_stop].transpose(1, 2), out=scores)
        if hidden is not None:
            scores.view(units, group, rows, -1).masked_fill_(hidden, -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        # For a row that has seen no key yet, -inf - (-inf) would be NaN.
        shift = new_top.masked_fill(new_top == -torch.inf, 0.0)
        weights = scores.sub_(shift).exp_()
        rescale = (top - shift).exp_()
        total.mul_(rescale).add_(weights.sum(-1, keepdim=True))
        out.mul_(rescale).baddbmm_(weights, v[:, k_start:k_stop])
        top = new_top
    out, lse = finish_softmax_(out, top, total)
    return out.view(units, group, rows, head_dim), lse.view(units, group, rows)


def full_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, q_idx: Tensor,
    q_lo: Tensor, k_idx: Tensor, softmax_scale: float, *,
    grad_dtype: torch.dtype | None = None, dq_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the share of (dq, dk, dv) that passes through this block of keys.

    Args:
        dout, out: like q. lse: `[b, h, s_q]`. out and lse are over all keys that the queries see.
        q, k, v, q_idx, q_lo, k_idx, softmax_scale: as in `full_fwd`.
        grad_dtype: of the results; default: the wider of fp32 and q.dtype.
        dq_sum: dq of other blocks, in any dtype; the share is added to it, and it is returned.
    """
    shapes, nheads_kv = (q.shape, k.shape), k.shape[2]
    dout, q, k, v, out = (fold(x, nheads_kv) for x in (dout, q, k, v, out))
    k, v = k.squeeze(1), v.squeeze(1)
    delta = (dout * out).sum(-1)
    lse = lse.reshape(delta.shape)
    # `out` is no longer needed: its buffer takes dq.
    dq, dk, dv = out.zero_(), torch.zeros_like(k), torch.zeros_like(v)
    band = (q_idx, q_lo, k_idx)
    add_grads((dout, q, lse, delta), (k, v), (dq, dk, dv), band, softmax_scale)
    folded = zip((dq, dk[:, None], dv[:, None]), (shapes[0], *shapes[1:] * 2), strict=True)
    dq, dk, dv = (unfold(x, shape).to(grad_dtype or x.dtype) for x, shape in folded)
    return dq if dq_sum is None else dq_sum.add_(dq), dk, dv


def add_grads(
    queries: tuple[Tensor, Tensor, Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    band: tuple[Tensor, Tensor, Tensor],
    softmax_scale: float,
    dlogits: Tensor | None = None,
) -> None:
    """Add the gradients of folded tensors to `grads` (dq, dk, dv); dq is zeros before.

    Args:
        queries: dout, q, lse, delta. keys: k, v. band: q_idx, q_lo, k_idx.
        dlogits: like lse; receives the sum of each row's gradients of scores.
    """
    (dout, q, lse, delta), (k, v), (dq, dk, dv) = queries, keys, grads
    block_q, block_k, units = tile_sides(q, k)
    scratch = q.new_empty(2, units * q.shape[1] * block_q * block_k)
    for start, stop, tiles in tiles_of_band(*band, block_q, block_k, q.device):
        for unit in range(0, len(q) if tiles else 0, units):
            rows = (slice(unit, unit + units), slice(None), slice(start, stop))
            own = rows[0]
            _bwd_rows(
                (dout[rows], q[rows] * softmax_scale, lse[rows], delta[rows]),
                (k[own], v[own]),
                (dq[rows], dk[own], dv[own]),
                tiles,
                scratch,
                None if dlogits is None else dlogits[rows],
            )
    dq.mul_(softmax_scale)


def _bwd_rows(
    queries: tuple[Tensor, Tensor, Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    tiles: list[Tile],
    scratch: Tensor,
    dlogits: Tensor | None,
) -> None:
    """Add the gradients of some rows to `grads` (dq, dk, dv); dlogits: as in `add_grads`.

    queries: dout, scaled q, lse, delta. keys: k, v. scratch: two buffers of scores.
    """
    units, group, rows, head_dim = queries[0].shape
    dout, q = (x.reshape(units, group * rows, head_dim) for x in queries[:2])
    lse, delta = (x.reshape(units, group * rows, 1) for x in queries[2:])
    (k, v), (dq, dk, dv) = keys, grads
    dq_rows = torch.zeros_like(q)
    for k_start, k_stop, hidden in tiles:
        own = slice(k_start, k_stop)
        shape = (units, group * rows, k_stop - k_start)
        weights, dscores = view_of(scratch[0], shape), view_of(scratch[1], shape)
        torch.bmm(q, k[:, own].transpose(1, 2), out=weights)
        weights.sub_(lse)
        if hidden is not None:
            weights.view(units, group, rows, -1).masked_fill_(hidden, -torch.inf)
        weights.exp_()
        dv[:, own].baddbmm_(weights.transpose(1, 2), dout)
        torch.bmm(dout, v[:, own].transpose(1, 2), out=dscores)
        dscores.sub_(delta).mul_(weights)
        if dlogits is not None:
            dlogits.add_(dscores.sum(-1).view(dlogits.shape))
        # q already includes softmax_scale.
        dk[:, own].baddbmm_(dscores.transpose(1, 2), q)
        dq_rows.baddbmm_(dscores, k[:, own])
    dq.add_(dq_rows.view(units, group, rows, head_dim))

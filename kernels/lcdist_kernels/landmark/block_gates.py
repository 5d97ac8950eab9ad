"""Steps of tiled landmark attention: rows of queries over whole past blocks.

A past block b is one entry of a row's softmax: its landmark's score x_ib is the logit and o_ib =
sum_j r_ibj v_j the value, where r_ib is the softmax inside the block. An online softmax over x
accumulates these (arXiv:2305.16300; arXiv:2307.08691). With w_ib = exp(x_ib - lse_i), u_ij = dout_i
. v_j, e_ib = sum_j r_ibj u_ij and delta_i = dout_i . out_i,

    dv_j = sum_i w_ib r_ibj dout_i
    ds_ij = w_ib r_ibj (u_ij - e_ib)      dx_ib = w_ib (e_ib - delta_i)

A landmark has r = 0, so its value is neither read nor changed. All block sizes work: a tile holds
whole blocks, many small ones or a single large one.
"""

import torch
from torch import Tensor

from lcdist_kernels.partial import finish_softmax_
from lcdist_kernels.tiles import view_of

# torch's softmax works row by row: below this length separate operations are faster.
SHORT_SOFTMAX = 16


class GateAccumulator:
    """Online softmax over past blocks of rows of queries `[n, r, d]`, times softmax_scale."""

    def __init__(self, q: Tensor) -> None:
        self.q = q
        self.top = q.new_full((*q.shape[:2], 1), -torch.inf)
        self.total = torch.zeros_like(self.top)
        self.out = torch.zeros_like(q)

    def add(self, k: Tensor, v: Tensor, hidden: Tensor | None, size: int, scratch: Tensor) -> None:
        """Accumulate blocks of `size` tokens: k, v `[n, m size, d]`.

        hidden: bool mask `[..., m]`; its other dims equal or broadcast to the dims that n and r
        were flattened from. None: every row sees every block. scratch: two buffers of scores.
        """
        inside, logits = _block_softmax(self.q, k, size, scratch)
        logits = _mask_logits(logits, hidden)
        new_top = torch.maximum(self.top, logits.amax(-1, keepdim=True))
        # For a row that has seen no block yet, -inf - (-inf) would be NaN.
        shift = new_top.masked_fill(new_top == -torch.inf, 0.0)
        gates = logits.sub_(shift).exp_()
        rescale = (self.top - shift).exp_()
        self.total.mul_(rescale).add_(gates.sum(-1, keepdim=True))
        weights = inside.mul_(gates[..., None]).flatten(2)
        self.out.mul_(rescale).baddbmm_(weights, v)
        self.top = new_top

    def result(self) -> tuple[Tensor, Tensor]:
        """Return (out `[n, r, d]`, lse `[n, r]`); 0 and -inf for a row that saw nothing."""
        out, lse = finish_softmax_(self.out, self.top, self.total)
        return out, lse[..., 0]


class GateGrads:
    """Backward of rows: dout and scaled q `[n, r, d]`; lse and delta `[n, r, 1]`."""

    def __init__(self, dout: Tensor, q: Tensor, lse: Tensor, delta: Tensor) -> None:
        self.dout, self.q, self.lse, self.delta = dout, q, lse, delta
        self.dq = torch.zeros_like(q)

    def add(
        self,
        keys: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor],
        hidden: Tensor | None,
        size: int,
        scratch: Tensor,
    ) -> None:
        """Add the gradients through some blocks to grads (dk, dv), shaped like keys (k, v)."""
        (k, v), (dk, dv) = keys, grads
        inside, logits = _block_softmax(self.q, k, size, scratch)
        gates = _mask_logits(logits.sub_(self.lse), hidden).exp_()
        shape = (len(k), self.q.shape[1], k.shape[1])
        dinside, products = view_of(scratch[2], shape), view_of(scratch[0], shape)
        torch.bmm(self.dout, v.transpose(1, 2), out=dinside)
        dinside, products = dinside.view_as(inside), products.view_as(inside)
        mean = torch.mul(inside, dinside, out=products).sum(-1)
        inside.mul_(gates[..., None])
        dv.baddbmm_(inside.flatten(2).transpose(1, 2), self.dout)
        dinside.sub_(mean[..., None]).mul_(inside)
        dinside[..., -1] = mean.sub_(self.delta).mul_(gates)
        dscores = dinside.flatten(2)
        # q already includes softmax_scale.
        dk.baddbmm_(dscores.transpose(1, 2), self.q)
        self.dq.baddbmm_(dscores, k)


def _block_softmax(q: Tensor, k: Tensor, size: int, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the softmax inside blocks `[n, r, m, size]`, 0 at landmarks, and the gate logits.

    The logits are landmarks' scores `[n, r, m]`. The softmax is in the second buffer; the first is
    free again.
    """
    shape = (len(q), q.shape[1], k.shape[1])
    scores, weights = view_of(scratch[0], shape), view_of(scratch[1], shape)
    torch.bmm(q, k.transpose(1, 2), out=scores)
    scores, weights = (x.unflatten(2, (-1, size)) for x in (scores, weights))
    logits = scores[..., -1].clone()
    scores[..., -1] = -torch.inf
    if size < SHORT_SOFTMAX:
        torch.sub(scores, scores.amax(-1, keepdim=True), out=weights).exp_()
        weights.div_(weights.sum(-1, keepdim=True))
    else:
        torch.softmax(scores, -1, out=weights)
    return weights, logits


def _mask_logits(logits: Tensor, hidden: Tensor | None) -> Tensor:
    """Set the logits of hidden blocks to -inf, in place."""
    if hidden is not None:
        logits.view(*_row_dims(logits, hidden), -1).masked_fill_(hidden, -torch.inf)
    return logits


def _row_dims(logits: Tensor, hidden: Tensor) -> tuple[int, ...]:
    """Return the dims of rows to which `hidden` broadcasts: (n, group, rows)."""
    rows = hidden.shape[-2]
    return len(logits), logits.shape[1] // rows, rows

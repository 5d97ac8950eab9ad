"""Dense landmark attention around a ring: whole blocks travel, partials merge (arXiv:2305.16300).

A past block is one entry of the gate's softmax, with its landmark's score as the logit, so a piece
of the sequence that consists of whole blocks gives a partial (out, lse) like any other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.shared.checks import tokens
from lcdist.exchange import Group, group_rank, ring, ring_with_gradients
from lcdist.layout import ContextLayout
from lcdist_kernels.landmark import TORCH_IMPL, LandmarkImpl, QueryRows, landmark_partial, sees_any
from lcdist_kernels.partial import merge


@dataclass(frozen=True)
class Ring:
    """Who is on the ring, whose blocks are whose, a score's scale, and what carries a piece."""

    layout: ContextLayout
    group: Group
    cu_seqlens: Tensor | None
    softmax_scale: float
    block_size: int
    operator: LandmarkImpl = TORCH_IMPL

    def rows(self) -> QueryRows:
        """This rank's queries."""
        return QueryRows(
            *tokens(self.layout, group_rank(self.group), self.cu_seqlens), self.block_size
        )

    def k_start(self, owner: int) -> Tensor:
        """Where `owner`'s blocks begin."""
        return self.layout.positions(owner)[:: self.block_size]


def ring_by_hand(q: Tensor, k: Tensor, v: Tensor, around: Ring) -> Tensor:
    """This rank's out of rotated q, k, v, with gradients by hand."""
    return _RingLandmark.apply(q, torch.stack((k, v)), around)


class _RingLandmark(torch.autograd.Function):
    """One lap forward, one lap backward; q, the own keys and values, out and lse are kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, around: Ring) -> Tensor:
        rows, partial = around.rows(), None
        for owner, (k_blk, v_blk) in ring(kv, around.group):
            k_start = around.k_start(owner)
            if not sees_any(rows, k_start):
                continue
            visit = around.operator.fwd(q, k_blk, v_blk, rows, k_start, around.softmax_scale)
            partial = visit if partial is None else merge(*partial, *visit)
        assert partial is not None, "a token sees at least its own block"
        out, lse = partial[0].to(q.dtype), partial[1]
        ctx.save_for_backward(q, kv, out, lse)
        ctx.around = around
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, kv, out, lse = ctx.saved_tensors
        around = ctx.around
        rows, dq = around.rows(), torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        lap = ring_with_gradients(kv, around.group)
        for visit in lap:
            k_start = around.k_start(visit.owner)
            if not sees_any(rows, k_start):
                continue
            k_blk, v_blk = visit.block
            dq_blk, dk, dv = around.operator.bwd(
                dout, q, k_blk, v_blk, out, lse, rows, k_start, around.softmax_scale
            )
            visit.add_gradient(torch.stack((dk, dv)))
            dq += dq_blk
        return dq.to(q.dtype), lap.result().to(kv.dtype), None


def reference_ring(q: Tensor, k: Tensor, v: Tensor, around: Ring) -> Tensor:
    """Dense maths on every piece, gradients by autograd: what `ring_by_hand` must meet."""
    rows, partial = around.rows(), None
    for owner, (k_blk, v_blk) in ring(torch.stack((k, v)), around.group):
        k_start = around.k_start(owner)
        visit = landmark_partial(q, k_blk, v_blk, rows, k_start, around.softmax_scale)
        partial = visit if partial is None else merge(*partial, *visit)
    assert partial is not None
    return partial[0].to(q.dtype)

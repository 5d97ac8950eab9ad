"""Dense landmark attention on a ring: whole blocks travel, partials merge (arXiv:2305.16300).

A past block is one entry of the gate's softmax, whose logit is its landmark's score. So a piece of
the sequence that consists of whole blocks gives a partial (out, lse) like any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.exchange import ring, ring_with_gradients
from lcdist_kernels.common import TensorNotes
from lcdist_kernels.landmark import TORCH_IMPL, LandmarkImpl, QueryRows, landmark_partial, sees_any
from lcdist_kernels.merge_kernel import merge_visit
from lcdist_kernels.partial import merge


def query_rows(ctx: AttentionContext) -> QueryRows:
    """Return this rank's queries."""
    return QueryRows(ctx.token_ids(), ctx.starts(), ctx.options.block_size)


def block_starts(ctx: AttentionContext, owner: int) -> Tensor:
    """Return the first token of each of `owner`'s blocks: the same tensor every time."""
    token_ids, size = ctx.token_ids(owner), ctx.options.block_size
    return _BLOCK_STARTS.find(token_ids, size, lambda: token_ids[::size].clone())


_BLOCK_STARTS = TensorNotes()


@dataclass(frozen=True)
class RingLandmark:
    """One lap forward, one lap backward, as `KeptPass` takes it.

    q `[b, s, h, d]`, kv `[2, b, s, h_kv, d]`, rotated; out is like q.
    """

    impl: LandmarkImpl
    ctx: AttentionContext

    def fwd(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse) over all ranks' blocks, out in q's dtype."""
        rows, partial = query_rows(self.ctx), None
        for owner, (k_blk, v_blk) in ring(kv, self.ctx.group):
            k_start = block_starts(self.ctx, owner)
            if not sees_any(rows, k_start):
                continue
            part = self.impl.fwd(q, k_blk, v_blk, rows, k_start, self.ctx.softmax_scale)
            partial = merge_visit(partial, part, by_kernel=self.impl is not TORCH_IMPL)
        assert partial is not None, "a token sees at least its own block"
        return partial[0].to(q.dtype), partial[1]

    def bwd(
        self, dout: Tensor, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of q and of own keys and values."""
        (q, kv), (out, lse), ctx = inputs, results, self.ctx
        rows, dq = query_rows(ctx), torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        lap = ring_with_gradients(kv, ctx.group)
        for visit in lap:
            k_start = block_starts(ctx, visit.owner)
            if not sees_any(rows, k_start):
                continue
            k_blk, v_blk = visit.block
            dq_blk, dk, dv = self.impl.bwd(
                dout, q, k_blk, v_blk, out, lse, rows, k_start, ctx.softmax_scale
            )
            visit.add_gradient(torch.stack((dk, dv)))
            dq += dq_blk
        return dq.to(q.dtype), lap.result().to(kv.dtype)


def reference_ring(q: Tensor, kv: Tensor, ctx: AttentionContext) -> Tensor:
    """Return out with dense maths on every piece and gradients by autograd.

    `RingLandmark` is tested against it.
    """
    rows, partial = query_rows(ctx), None
    for owner, (k_blk, v_blk) in ring(kv, ctx.group):
        k_start = block_starts(ctx, owner)
        part = landmark_partial(q, k_blk, v_blk, rows, k_start, ctx.softmax_scale)
        partial = part if partial is None else merge(*partial, *part)
    assert partial is not None
    return partial[0].to(q.dtype)

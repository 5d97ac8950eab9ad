"""Dense landmark attention on a ring: whole blocks travel, partials merge (arXiv:2305.16300).

A past block is one entry of the gate's softmax, whose logit is its landmark's score. So a piece of
the sequence that consists of whole blocks gives a partial (out, lse) like any other.
"""

from typing import Any

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.exchange import ring, ring_with_gradients
from lcdist_kernels.common import TensorNotes
from lcdist_kernels.landmark import TORCH_IMPL, LandmarkImpl, QueryRows, landmark_partial, sees_any
from lcdist_kernels.merge_kernel import merge_visit
from lcdist_kernels.partial import merge
from lcdist_kernels.tape import kept


def query_rows(ctx: AttentionContext) -> QueryRows:
    """Return this rank's queries."""
    return QueryRows(ctx.token_ids(), ctx.starts(), ctx.options.block_size)


def block_starts(ctx: AttentionContext, owner: int) -> Tensor:
    """Return the first token of each of `owner`'s blocks: the same tensor every time."""
    token_ids, size = ctx.token_ids(owner), ctx.options.block_size
    return _BLOCK_STARTS.find(token_ids, size, lambda: token_ids[::size].clone())


_BLOCK_STARTS = TensorNotes()


class RingLandmark(torch.autograd.Function):
    """One lap forward, one lap backward; saves q, own keys and values, out and lse.

    q `[b, s, h, d]`, kv `[2, b, s, h_kv, d]`, rotated; out is like q.
    """

    @staticmethod
    def forward(
        node: Any, q: Tensor, kv: Tensor, impl: LandmarkImpl, ctx: AttentionContext
    ) -> Tensor:
        out, lse = kept(lambda: _lap(q, kv, impl, ctx))
        node.save_for_backward(q, kv, out, lse)
        node.impl, node.attention = impl, ctx
        return out

    @staticmethod
    def backward(node: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, kv, out, lse = node.saved_tensors
        ctx = node.attention
        rows, dq = query_rows(ctx), torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        lap = ring_with_gradients(kv, ctx.group)
        for visit in lap:
            k_start = block_starts(ctx, visit.owner)
            if not sees_any(rows, k_start):
                continue
            k_blk, v_blk = visit.block
            dq_blk, dk, dv = node.impl.bwd(
                dout, q, k_blk, v_blk, out, lse, rows, k_start, ctx.softmax_scale
            )
            visit.add_gradient(torch.stack((dk, dv)))
            dq += dq_blk
        return dq.to(q.dtype), lap.result().to(kv.dtype), None, None


def _lap(q: Tensor, kv: Tensor, impl: LandmarkImpl, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
    """Return (out, lse) over all ranks' blocks, out in q's dtype."""
    rows, partial = query_rows(ctx), None
    for owner, (k_blk, v_blk) in ring(kv, ctx.group):
        k_start = block_starts(ctx, owner)
        if not sees_any(rows, k_start):
            continue
        part = impl.fwd(q, k_blk, v_blk, rows, k_start, ctx.softmax_scale)
        partial = merge_visit(partial, part, by_kernel=impl is not TORCH_IMPL)
    assert partial is not None, "a token sees at least its own block"
    return partial[0].to(q.dtype), partial[1]


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

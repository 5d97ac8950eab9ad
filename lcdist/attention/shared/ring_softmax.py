"""Causal softmax attention around a ring (arXiv:2310.01889), for methods whose scores are q.k.

Every rank keeps its queries. Each block of keys and values visits every rank once and gives a
partial result (out, lse) over the keys that are visible there; partials are merged in fp32. The
mask follows from global token numbers alone, so a zigzag or striped layout needs no code of its
own. A method supplies a `RingKernel`: the block to send, and its queries and keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.attention.shape import Shape, Traffic
from lcdist.exchange import ring, ring_with_gradients
from lcdist.layout import ContextLayout
from lcdist_kernels.full import TORCH_IMPL, AttentionImpl, full_partial, merge, reaches, visible
from lcdist_kernels.merge_kernel import merge_visit


class RingKernel(Protocol):
    """Conversions between what a ring moves and what attention multiplies, with their adjoints.

    Autograd sees none of these functions. Gradients may be of a wider dtype than their tensors.

    block_impl: computes the partial result of one block.
    owner: the rank that a block belongs to.
    """

    block_impl: AttentionImpl

    def queries(self, q: Tensor) -> Tensor:
        """Return the queries to multiply with keys, shaped like q."""
        ...

    def queries_bwd(self, dqueries: Tensor, q: Tensor) -> Tensor:
        """Return the gradient of q from the gradient of the queries."""
        ...

    def keys(self, block: Tensor, owner: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values `[b, s, h_kv, d]` of a block."""
        ...

    def keys_bwd(self, dkeys: Tensor, dvalues: Tensor, owner: int) -> Tensor:
        """Return the gradient of a block, in its shape, from those of its keys and values."""
        ...


@dataclass(frozen=True)
class RingSoftmax:
    """One ring pass forward, one backward, of q and the own block, as `KeptPass` takes it."""

    kernel: RingKernel
    ctx: AttentionContext

    def fwd(self, q: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse) over all ranks' blocks, out in q's dtype."""
        kernel, ctx = self.kernel, self.ctx
        token_ids, starts = ctx.token_ids(), ctx.starts()
        queries = kernel.queries(q)
        partial, by_kernel = None, kernel.block_impl is not TORCH_IMPL
        for owner, blk in ring(block, ctx.group):
            k_ids = ctx.token_ids(owner)
            if not reaches(token_ids, starts, k_ids):
                continue
            k_blk, v_blk = kernel.keys(blk, owner)
            band = (token_ids, starts, k_ids)
            visit = kernel.block_impl.fwd(queries, k_blk, v_blk, *band, ctx.softmax_scale)
            partial = merge_visit(partial, visit, by_kernel=by_kernel)
        assert partial is not None, "a token sees at least itself"
        return partial[0].to(q.dtype), partial[1]

    def bwd(
        self, dout: Tensor, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of q and of the own block."""
        (q, block), (out, lse) = inputs, results
        kernel, ctx = self.kernel, self.ctx
        token_ids, starts = ctx.token_ids(), ctx.starts()
        queries = kernel.queries(q)
        dqueries = None
        visits = ring_with_gradients(block, ctx.group)
        for visit in visits:
            k_ids = ctx.token_ids(visit.owner)
            if not reaches(token_ids, starts, k_ids):
                continue
            k_blk, v_blk = kernel.keys(visit.block, visit.owner)
            band = (token_ids, starts, k_ids)
            # Kernels add a later visit's share to dqueries; a library's is added by torch.
            dqueries, dk, dv = kernel.block_impl.bwd(
                dout, queries, k_blk, v_blk, out, lse, *band, ctx.softmax_scale, dq_sum=dqueries
            )
            visit.add_gradient(kernel.keys_bwd(dk, dv, visit.owner))
            dqueries = dqueries.to(lse.dtype)
        assert dqueries is not None, "a token sees at least itself"
        return kernel.queries_bwd(dqueries, q).to(q.dtype), visits.result().to(block.dtype)


def reference_ring(
    queries: Tensor,
    block: Tensor,
    keys: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    ctx: AttentionContext,
) -> Tensor:
    """Return attention over a ring with dense maths on every block and gradients by autograd.

    `RingSoftmax` is tested against it.

    Args:
        queries: `[b, s_local, h, d]`, ready to multiply with keys.
        block: what this rank sends.
        keys: (block, owner) -> (k, v), differentiable.

    Returns:
        out, in the wider of fp32 and queries.dtype.
    """
    token_ids, starts = ctx.token_ids(), ctx.starts()
    partials = []
    for owner, blk in ring(block, ctx.group):
        mask = visible(token_ids, starts, ctx.token_ids(owner)).to(queries.device)
        partials.append(full_partial(queries, *keys(blk, owner), mask, ctx.softmax_scale))
    out, lse = partials[0]
    for out_blk, lse_blk in partials[1:]:
        out, lse = merge(out, lse, out_blk, lse_blk)
    return out


def ring_bytes(shape: Shape, layout: ContextLayout, features: int) -> Traffic:
    """Count the bytes that each rank sends in one layer.

    Forward: cp - 1 hops of the block. Backward: the same again, and cp hops of its gradient, in the
    wider of fp32 and the block's dtype. cp_size = 1 sends nothing.

    features: elements that travel per token and key head.
    """
    cp = layout.cp_size
    if cp == 1:
        return Traffic((0,), (0,))
    elements = shape.batch * layout.local_seqlen * shape.nheads_kv * features
    forward = (cp - 1) * elements * shape.itemsize
    backward = forward + cp * elements * max(4, shape.itemsize)
    return Traffic((forward,) * cp, (backward,) * cp)

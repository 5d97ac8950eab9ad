"""Causal softmax attention around a ring (arXiv:2310.01889), for every method whose scores are q.k.

Each rank keeps its queries; every block visits it once and gives a partial (out, lse) over the
visible part of its keys; partials are merged in fp32, and the last merge is the answer. What is
visible follows from global token numbers alone, so a zigzag or striped cut is balanced without a
line of its own. A method says what travels, and how queries, keys and values come of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lcdist.attention.interface import Shape, Traffic
from lcdist.attention.shared.checks import tokens
from lcdist.exchange import Group, group_rank, ring, ring_with_gradients
from lcdist.layout import ContextLayout
from lcdist_kernels.full import TORCH_IMPL, AttentionImpl, full_partial, merge, reaches, visible


@dataclass(frozen=True)
class Lap:
    """Who is on the ring, whose tokens are whose, a score's scale, and what carries a block."""

    layout: ContextLayout
    group: Group
    cu_seqlens: Tensor | None
    softmax_scale: float
    operator: AttentionImpl = TORCH_IMPL

    def here(self) -> tuple[Tensor, Tensor]:
        """This rank's global token numbers, and the first token of each one's document."""
        return tokens(self.layout, group_rank(self.group), self.cu_seqlens)

    def positions(self, owner: int) -> Tensor:
        """Where `owner`'s tokens stand in their documents: int64 `[local_seqlen]`, on the CPU."""
        index, starts = tokens(self.layout, owner, self.cu_seqlens)
        return index - starts


class RingKernel(Protocol):
    """What a method makes of its q and of a block, and the adjoints of that.

    positions: of the tokens of q or of the block in their documents. Nothing here is seen by
    autograd; gradients may be of a wider dtype than what they belong to.
    """

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """What is multiplied with keys, like q."""
        ...

    def queries_bwd(self, dqueries: Tensor, q: Tensor, positions: Tensor) -> Tensor:
        """The gradient of q from that of the queries."""
        ...

    def keys(self, block: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values `[b, s, h_kv, d]` that a block stands for."""
        ...

    def keys_bwd(self, dkeys: Tensor, dvalues: Tensor, positions: Tensor) -> Tensor:
        """The gradient of the block, of its shape, from those of its keys and values."""
        ...


class RingSoftmax(torch.autograd.Function):
    """One lap forward, one lap backward; q, the own block, out and lse are all that is kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, block: Tensor, factors: RingKernel, lap: Lap) -> Tensor:
        index, starts = lap.here()
        queries = factors.queries(q, index - starts)
        partial = None
        for owner, blk in ring(block, lap.group):
            k_idx = lap.layout.positions(owner)
            if not reaches(index, starts, k_idx):
                continue
            k_blk, v_blk = factors.keys(blk, lap.positions(owner))
            visit = lap.operator.fwd(queries, k_blk, v_blk, index, starts, k_idx, lap.softmax_scale)
            partial = visit if partial is None else merge(*partial, *visit)
        assert partial is not None, "a token sees at least itself"
        out, lse = partial[0].to(q.dtype), partial[1]
        ctx.save_for_backward(q, block, out, lse)
        ctx.factors, ctx.lap = factors, lap
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, block, out, lse = ctx.saved_tensors
        factors, around = ctx.factors, ctx.lap
        index, starts = around.here()
        queries = factors.queries(q, index - starts)
        dqueries = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        lap = ring_with_gradients(block, around.group)
        for visit in lap:
            k_idx = around.layout.positions(visit.owner)
            if not reaches(index, starts, k_idx):
                continue
            positions = around.positions(visit.owner)
            k_blk, v_blk = factors.keys(visit.block, positions)
            band = (index, starts, k_idx)
            dqueries_blk, dk, dv = around.operator.bwd(
                dout, queries, k_blk, v_blk, out, lse, *band, around.softmax_scale
            )
            visit.add_gradient(factors.keys_bwd(dk, dv, positions))
            dqueries += dqueries_blk
        dq = factors.queries_bwd(dqueries, q, index - starts)
        return dq.to(q.dtype), lap.result().to(block.dtype), None, None


def reference_ring(
    queries: Tensor,
    block: Tensor,
    keys: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    lap: Lap,
) -> Tensor:
    """Dense maths on every block, gradients by autograd: what `RingSoftmax` must meet.

    queries: what is multiplied with keys. keys(block, positions) -> (k, v), differentiable. out is
    in the wider of fp32 and queries.dtype.
    """
    index, starts = lap.here()
    parts = []
    for owner, blk in ring(block, lap.group):
        mask = visible(index, starts, lap.layout.positions(owner)).to(queries.device)
        parts.append(
            full_partial(queries, *keys(blk, lap.positions(owner)), mask, lap.softmax_scale)
        )
    out, lse = parts[0]
    for out_blk, lse_blk in parts[1:]:
        out, lse = merge(out, lse, out_blk, lse_blk)
    return out


def ring_bytes(shape: Shape, layout: ContextLayout, features: int) -> Traffic:
    """Bytes each rank sends in one layer, `features` being what travels of a token and key head.

    Forward cp - 1 hops of the block; backward the same again, and cp hops of its gradient, which
    travels in the wider of fp32 and the block's dtype. cp_size = 1 sends nothing.
    """
    cp = layout.cp_size
    if cp == 1:
        return Traffic((0,), (0,))
    elements = shape.batch * layout.local_seqlen * shape.nheads_kv * features
    forward = (cp - 1) * elements * shape.itemsize
    backward = forward + cp * elements * max(4, shape.itemsize)
    return Traffic((forward,) * cp, (backward,) * cp)

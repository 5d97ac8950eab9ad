"""Landmark attention as a differentiable torch function; see `common.check_impl`."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import (
    check_impl,
    check_self,
    document_borders,
    document_starts,
    resolve_scale,
)
from lcdist_kernels.landmark.blocks import (
    BlockGrid,
    QueryRows,
    block_grid,
    block_starts,
    landmarks,
    unit_lengths,
)
from lcdist_kernels.landmark.impl import TORCH_IMPL, LandmarkImpl, select_landmark_impl
from lcdist_kernels.landmark.reference import check_sizes, landmark_reference
from lcdist_kernels.landmark.sparse import BlockLists
from lcdist_kernels.merge_kernel import merge_visit
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.tape import kept

IMPLS = ("auto", "triton", "torch", "reference")

# Sequences with documents of their own come and go; all layers of one share its plan.
PLANS_KEPT = 32


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    block_size: int, top_k: int | None = None, select_tokens: int = 1, rotary: Rotary | None = None,
    positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    With top_k and select_tokens = 1 it is causal token by token. In a larger unit, a later query
    influences which past blocks the unit's earlier queries read, never the content of these blocks.

    Args:
        impl: one of `IMPLS`.
        other: as in `landmark_reference`.

    Raises:
        ValueError: as `landmark_reference`; also an unknown `impl`, or tensors that kernels do not
            take.
    """
    check_impl(impl, "landmark", IMPLS)
    if impl == "reference":
        return landmark_reference(
            q, k, v, block_size=block_size, top_k=top_k, select_tokens=select_tokens, rotary=rotary,
            positions=positions, cu_seqlens=cu_seqlens, softmax_scale=softmax_scale,
        )  # fmt: skip
    check_self(q, k, v)
    check_sizes(block_size, top_k, select_tokens)
    implementation = select_landmark_impl(impl, q, "landmark attention")
    documents = document_borders(cu_seqlens, q.shape[1])
    plan = _make_plan(q.shape[1], documents, block_size, select_tokens)
    if rotary is not None:
        positions = plan.positions if positions is None else positions
        q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    scale, grid = resolve_scale(softmax_scale, q.shape[3]), plan.grid
    k, v = grid.to_slots(k), grid.to_slots(v)
    if top_k is None:
        return LandmarkFunction.apply(q, k, v, grid.rows, plan.k_start, scale, implementation)

    def choose() -> tuple[Tensor]:
        keys = landmarks(k.detach(), block_size)
        rows = (grid.rows, plan.lengths)
        return (implementation.choose_blocks(q.detach(), keys, *rows, top_k, scale),)

    [chosen] = kept(choose)
    units = (chosen, plan.lengths, grid.rows)
    return LocalSparseFunction.apply(q, k, v, *units, scale, implementation)


class _Plan(NamedTuple):
    """Tables of a whole sequence that do not depend on its tensors: int64, on the CPU.

    positions: of tokens in their documents. k_start: first slots of blocks. lengths: of units.
    """

    positions: Tensor
    grid: BlockGrid
    k_start: Tensor
    lengths: Tensor


@lru_cache(maxsize=PLANS_KEPT)
@torch.inference_mode(False)
def _make_plan(
    seqlen: int, documents: tuple[int, ...] | None, block_size: int, select_tokens: int
) -> _Plan:
    """Return the plan of a sequence; documents as in `document_borders`."""
    cu_seqlens = None if documents is None else torch.tensor(documents)
    index = torch.arange(seqlen)
    starts = document_starts(cu_seqlens, index, seqlen)
    grid = block_grid(cu_seqlens, seqlen, block_size)
    lengths = unit_lengths(index, starts, select_tokens)
    return _Plan(index - starts, grid, block_starts(grid.num_slots, block_size), lengths)


class LandmarkFunction(torch.autograd.Function):
    """Self-attention over one block of keys; saves q, k, v, out and lse."""

    @staticmethod
    def forward(
        ctx: Any, q, k, v, rows: QueryRows, k_start: Tensor, scale: float, impl: LandmarkImpl
    ):
        out, lse = kept(lambda: impl.fwd(q, k, v, rows, k_start, scale, out_dtype=q.dtype))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.band, ctx.impl = (rows, k_start, scale), impl
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = ctx.impl.bwd(dout, *ctx.saved_tensors, *ctx.band, grad_dtype=dout.dtype)
        return *grads, None, None, None, None


class SparseContext(NamedTuple):
    """Inputs of `SparseFunction` besides tensors. first: the first slot of its own keys."""

    lists: BlockLists
    rows: QueryRows
    first: int
    softmax_scale: float
    impl: LandmarkImpl = TORCH_IMPL

    def k_start(self, k: Tensor) -> Tensor:
        """Return the first slots of the blocks of k."""
        return self.first + block_starts(k.shape[1], self.rows.block_size)

    @torch.no_grad()
    def own_partial(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the partial over own blocks."""
        return self.impl.own_fwd(q, k, v, self.rows, self.k_start(k), self.softmax_scale)


class SparseFunction(torch.autograd.Function):
    """Attention over own blocks among k, v, and over listed blocks of a fetched table.

    Saves q, k, v, the table, out, lse and the lists.

    Args:
        own_table: this rank's blocks, part of what all ranks fetched; gets the gradient that
            `send_back` returns.
        table: the blocks that this rank fetched, without gradient.
        own: the partial over own blocks, computed while the table was exchanged; None in a second
            run, which takes the results of the first.
        send_back: posts the gradient of the table to the blocks' owners; returns a function that
            waits for the gradient of own_table. Own gradients are computed between the two.
    """

    @staticmethod
    def forward(
        ctx: Any, q, k, v, own_table, table, own: Any, send_back: Any, context: SparseContext
    ):
        lists, rows, _, scale, impl = context

        def attend() -> tuple[Tensor, Tensor]:
            past = impl.sparse_fwd(q, table, lists, rows, scale)
            out, lse = merge_visit(own, past, by_kernel=impl is not TORCH_IMPL)
            return out.to(q.dtype), lse

        out, lse = kept(attend)
        # A table may have a wider dtype, in which its gradient travels; its values do not need it.
        ctx.save_for_backward(q, k, v, table.to(q.dtype), out, lse)
        ctx.context, ctx.send_back, ctx.owned = context, send_back, own_table.dtype
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, table, out, lse = ctx.saved_tensors
        lists, rows, _, scale, impl = context = ctx.context
        dq, dtable = impl.sparse_bwd(dout, q, table, out, lse, lists, rows, scale)
        receive = ctx.send_back(dtable)
        own = impl.own_bwd(dout, q, k, v, out, lse, rows, context.k_start(k), scale)
        dq, dk, dv = dq.add_(own[0]), *own[1:]
        owned = receive().to(ctx.owned)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), owned, None, None, None, None


class LocalSparseFunction(torch.autograd.Function):
    """Attention over own and chosen blocks of k, v; saves q, k, v, out, lse and the choice."""

    @staticmethod
    def forward(ctx: Any, q, k, v, chosen, lengths, rows: QueryRows, scale, impl: LandmarkImpl):
        out, lse = kept(lambda: impl.local_fwd(q, k, v, chosen, lengths, rows, scale))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.units, ctx.impl = (chosen, lengths, rows, scale), impl
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        grads = ctx.impl.local_bwd(dout, *ctx.saved_tensors, *ctx.units)
        return *grads, None, None, None, None, None

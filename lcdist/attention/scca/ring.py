"""Key-residue dilation under context parallelism: a ring of just the keys that anyone reads.

Under `sda_key` all queries of a head read the keys at j = s (mod r) of their document and no other,
so of each key head only the residues its query heads read go round: one in r where they share a
shift (arXiv:2312.07305). Every rank's block has as many slots as the longest has; the rest is pad
that nobody sees. Keys and values travel in their own dtype, gradients in the wider of it and fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist.attention.shape import Shape, Traffic
from lcdist.attention.shared.checks import tokens
from lcdist.exchange import Group, group_rank, ring, ring_with_gradients
from lcdist.layout import ContextLayout
from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full import (
    TORCH_IMPL,
    AttentionImpl,
    full_partial,
    merge,
    reaches,
    visible,
)
from lcdist_kernels.scca import HeadGroup, Part, Rule, banded_bwd, banded_fwd, head_groups

ALL = slice(None)


class _Stream(NamedTuple):
    """Key heads of one shift, and where they stand in the block: query heads `members` of each."""

    kv: slice
    members: slice
    held: slice
    shift: int


@dataclass(frozen=True)
class KeyRing:
    """Who is on the ring, and which keys of whom travel. groups: of heads under one dilation."""

    groups: tuple[HeadGroup, ...]
    layout: ContextLayout
    group: Group
    cu_seqlens: Tensor | None
    softmax_scale: float
    operator: AttentionImpl = TORCH_IMPL

    @cached_property
    def dilation(self) -> int:
        """The one dilation of all heads."""
        return self.groups[0].members[0][1].size

    @cached_property
    def streams(self) -> list[_Stream]:
        """All of them, in the order in which a block holds them."""
        found, held = [], 0
        for of in self.groups:
            heads = len(range(of.kv.start, of.kv.stop, of.kv.step))
            for members, rule in of.members:
                found.append(_Stream(of.kv, members, slice(held, held + heads), rule.shift))
                held += heads
        return found

    @cached_property
    def slots(self) -> int:
        """Tokens in a block: of the residue of which a rank has most."""
        return max(
            int(self._residues(rank).bincount(minlength=self.dilation)[shift])
            for rank in range(self.layout.cp_size)
            for shift in {stream.shift for stream in self.streams}
        )

    def _residues(self, rank: int) -> Tensor:
        index, starts = tokens(self.layout, rank, self.cu_seqlens)
        return (index - starts) % self.dilation

    def own(self, shift: int) -> Tensor:
        """Local numbers of this rank's tokens at residue `shift`, at most `slots`."""
        return (self._residues(group_rank(self.group)) == shift).nonzero().flatten()

    def keys(self, owner: int, shift: int) -> Tensor:
        """Global numbers of the tokens in `owner`'s block; seqlen where it is pad."""
        at = self.layout.positions(owner)[self._residues(owner) == shift]
        pad = at.new_full((self.slots - len(at),), self.layout.seqlen)
        return torch.cat((at, pad))

    def block(self, k: Tensor, v: Tensor) -> Tensor:
        """`[2, b, slots, heads, d]`: what this rank sends round; differentiable."""
        parts = []
        for stream in self.streams:
            chosen = self.own(stream.shift).to(k.device)
            kv = torch.stack([x[:, :, stream.kv].index_select(1, chosen) for x in (k, v)])
            pad = kv.new_zeros(*kv.shape[:2], self.slots - len(chosen), *kv.shape[3:])
            parts.append(torch.cat((kv, pad), 2))
        return torch.cat(parts, 3)

    def home(self, dblock: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """(dk, dv) like k from the gradient of the block."""
        grad = torch.zeros((2, *k.shape), dtype=dblock.dtype, device=k.device)
        for stream in self.streams:
            chosen = self.own(stream.shift).to(k.device)
            grad[:, :, :, stream.kv].index_add_(2, chosen, dblock[:, :, : len(chosen), stream.held])
        dk, dv = grad.to(k.dtype)
        return dk, dv

    def parts(self, owner: int) -> list[Part]:
        """What this rank's queries see of `owner`'s block."""
        index, starts = tokens(self.layout, group_rank(self.group), self.cu_seqlens)
        found = []
        for stream in self.streams:
            k_idx = self.keys(owner, stream.shift)
            if self.slots and reaches(index, starts, k_idx):
                heads = (stream.kv, stream.held, stream.members)
                found.append(Part(ALL, ALL, *heads, index, starts, k_idx))
        return found


class RingKeys(torch.autograd.Function):
    """One lap forward, one backward; kept: q, k, v, out and lse. q `[b, s, h_kv, h / h_kv, d]`."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, around: KeyRing) -> Tensor:
        done = banded_fwd(q, k, v, (), around.softmax_scale)
        for owner, (k_blk, v_blk) in ring(around.block(k, v), around.group):
            parts, scale = around.parts(owner), around.softmax_scale
            done = banded_fwd(q, k_blk, v_blk, parts, scale, done, impl=around.operator)
        out = done[0].to(q.dtype)
        ctx.save_for_backward(q, k, v, out, done[1])
        ctx.around = around
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        around, scale = ctx.around, ctx.around.softmax_scale
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        lap = ring_with_gradients(around.block(k, v), around.group)
        for visit in lap:
            (k_blk, v_blk), parts = visit.block, around.parts(visit.owner)
            shares = banded_bwd(
                dout, q, k_blk, v_blk, (out, lse), parts, dq, scale, impl=around.operator
            )
            visit.add_gradient(torch.stack(shares))
        return dq.to(q.dtype), *around.home(lap.result(), k), None


def reference_keys(q: Tensor, k: Tensor, v: Tensor, around: KeyRing) -> Tensor:
    """Dense maths on every block, gradients by autograd: what `RingKeys` must meet."""
    index, starts = tokens(around.layout, group_rank(around.group), around.cu_seqlens)
    q = q.to(wide_dtype(q.dtype))
    done: list[tuple[Tensor, Tensor] | None] = [None] * len(around.streams)
    for owner, (k_blk, v_blk) in ring(around.block(k, v), around.group):
        for i, stream in enumerate(around.streams):
            mask = visible(index, starts, around.keys(owner, stream.shift)).to(q.device)
            queries = q[:, :, stream.kv, stream.members].flatten(2, 3)
            own = (ALL, ALL, stream.held)
            part = full_partial(queries, k_blk[own], v_blk[own], mask, around.softmax_scale)
            before = done[i]
            done[i] = part if before is None else merge(*before, *part)
    out = torch.zeros_like(q)
    for stream, row in zip(around.streams, done, strict=True):
        assert row is not None
        where = (ALL, ALL, stream.kv, stream.members)
        out = out.clone()
        out[where] = row[0].view(out[where].shape)
    return out


def ring_key_bytes(rules: Sequence[Rule], shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends for key rules, one a query head of `shape`; none for other rules.

    Forward cp - 1 hops of the block; backward the same again, and cp hops of its gradient in the
    wider of fp32 and its dtype. Of one document as long as the layout.
    """
    cp = layout.cp_size
    if cp == 1 or rules[0].kind != "key":
        return Traffic((0,) * cp, (0,) * cp)
    around = KeyRing(head_groups(rules, shape.nheads_kv), layout, None, None, 1.0)
    heads = around.streams[-1].held.stop
    elements = 2 * shape.batch * around.slots * heads * shape.head_dim
    forward = (cp - 1) * elements * shape.itemsize
    backward = forward + cp * elements * max(4, shape.itemsize)
    return Traffic((forward,) * cp, (backward,) * cp)

"""Shifted dilated attention under context parallelism: an all-to-all over (head, residue) units.

The queries, keys and values of a unit (`scca_units`) travel together to one rank, which sorts them,
computes them as an ordinary causal problem of seqlen / r tokens, and sends the outputs back: the
exchange of DeepSpeed-Ulysses (arXiv:2309.14509) with r times as many heads (arXiv:2312.07305). A
rank sends the same number of slots of every residue; what its tokens leave empty is pad, which sees
nothing and is seen by nobody. Where a key head has several bundles its keys are sent to each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist.attention.scca.units import Units, dilated_heads
from lcdist.attention.shape import Shape, Traffic
from lcdist.exchange import Group, Pending, group_rank, swap
from lcdist.layout import ContextLayout
from lcdist_kernels.common import document_starts
from lcdist_kernels.full import TORCH_IMPL, AttentionImpl, full_partial, visible
from lcdist_kernels.scca import Part, Rule, banded_bwd, banded_fwd, head_groups

ALL = slice(None)


class _Take(torch.autograd.Function):
    """Rows of `[b, rows, d]` by number; the gradient is taken back by the inverse numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(1, rows)

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dout.index_select(1, ctx.inverse), None, None


class _Table(NamedTuple):
    """A rearrangement of rows and its inverse; pad takes row 0, which nobody reads."""

    rows: Tensor
    inverse: Tensor

    def there(self, x: Tensor) -> Tensor:
        return _Take.apply(x, *self)

    def back(self, x: Tensor) -> Tensor:
        return _Take.apply(x, self.inverse, self.rows)


def _table(rows: Tensor, size: int, device: torch.device) -> _Table:
    """rows: numbers below `size`, negative for pad; each at most once, else pad comes for it."""
    rows = rows.flatten()
    real = (rows >= 0).nonzero().flatten()
    inverse = torch.zeros(size, dtype=torch.int64)
    inverse[rows[real]] = real
    return _Table(rows.clamp_min(0).to(device), inverse.to(device))


@dataclass(frozen=True)
class UnitSwap:
    """The exchange for heads of one dilation, seen from one rank."""

    units: Units
    group: Group
    cu_seqlens: Tensor | None
    softmax_scale: float
    operator: AttentionImpl = TORCH_IMPL

    @cached_property
    def _slots(self) -> list[int]:
        return [self.units.slots(rank) for rank in range(self.units.layout.cp_size)]

    @cached_property
    def _mine(self) -> slice:
        """The units of this rank."""
        ends, rank = [0, *accumulate(self.units.sizes)], group_rank(self.group)
        return slice(ends[rank], ends[rank + 1])

    def _sending(self, lanes: int, heads: int, device: torch.device) -> _Table:
        """From rows (token, head) of this rank to rows (slot, unit, lane), its first `lanes`."""
        token = self.units.tokens(group_rank(self.group))[self.units.residues[:, :lanes]]
        rows = token * heads + self.units.lane_heads[:, :lanes, None]
        rows = rows.masked_fill(token < 0, -1).permute(2, 0, 1)
        return _table(rows, self.units.layout.local_seqlen * heads, device)

    def _sorting(self, lanes: int, device: torch.device) -> _Table:
        """From rows (slot, own unit, lane) to the same in global order of tokens."""
        residues = self.units.residues[self._mine, :lanes]
        slot = self.units.arrivals()[residues]
        own = torch.arange(residues.numel()).view(residues.shape)[..., None]
        rows = (slot * residues.numel() + own).masked_fill(slot < 0, -1).permute(2, 0, 1)
        return _table(rows, sum(self._slots) * residues.numel(), device)

    def to_units(self, x: Tensor, lanes: int) -> Pending:
        """Sends the first `lanes` lanes of `[b, s_local, heads, d]` to the units' ranks."""
        sizes, head_dim = self.units.sizes, x.shape[3]
        x = self._sending(lanes, x.shape[2], x.device).there(x.flatten(1, 2))
        slots = self._slots[group_rank(self.group)]
        x = x.reshape(len(x), slots, sum(sizes), lanes * head_dim)
        return swap(x, 1, 2, self.group, shard_sizes=self._slots, full_sizes=sizes)

    def at_units(self, pending: Pending, lanes: int) -> Tensor:
        """What has come, in order: `[b, seqlen / r rounded up, own units, lanes, d]`."""
        x = pending.wait()
        batch, slots, held, width = x.shape
        x = x.reshape(batch, slots * held * lanes, width // lanes)
        x = self._sorting(lanes, x.device).there(x)
        return x.view(batch, self._length, held, lanes, width // lanes)

    def to_tokens(self, x: Tensor) -> Pending:
        """Sends what `at_units` gives, or something like it, back to the tokens' ranks."""
        batch, _, held, lanes, head_dim = x.shape
        x = self._sorting(lanes, x.device).back(x.reshape(batch, -1, head_dim))
        x = x.view(batch, sum(self._slots), held, lanes * head_dim)
        return swap(x, 2, 1, self.group, shard_sizes=self.units.sizes, full_sizes=self._slots)

    def at_tokens(self, pending: Pending, lanes: int, heads: int) -> Tensor:
        """What has come back, `[b, s_local, heads, d]`."""
        x = pending.wait()
        head_dim = x.shape[3] // lanes
        x = x.reshape(len(x), -1, head_dim)
        return self._sending(lanes, heads, x.device).back(x).view(len(x), -1, heads, head_dim)

    def post(self, q: Tensor, k: Tensor, v: Tensor) -> Pending:
        """Sends queries `[b, s_local, h, d]` of the units' heads, and of all k, v what they need.

        All are rotated; differentiable.
        """
        if self.units.repeats or k.shape[2] != self.units.bundles:
            heads = self.units.bundle_kv_heads.to(k.device)
            k, v = k.index_select(2, heads), v.index_select(2, heads)
        return self.to_units(torch.cat((q, k, v), 2), self.units.members + 2)

    def lanes(self, pending: Pending) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of this rank's units."""
        x = self.at_units(pending, self.units.members + 2)
        q, k, v = x.split([self.units.members, 1, 1], 3)
        return q, k.squeeze(3), v.squeeze(3)

    def outputs(self, out: Tensor) -> Tensor:
        """The units' outputs, at home."""
        members, heads = self.units.members, len(self.units.heads.shifts)
        return self.at_tokens(self.to_tokens(out), members, heads)

    @cached_property
    def _length(self) -> int:
        """Tokens of the commonest residue."""
        return -(-self.units.layout.seqlen // self.units.heads.dilation)

    def parts(self) -> list[Part]:
        """What this rank's units compute."""
        units, r = self.units, self.units.heads.dilation
        shifts = torch.tensor(units.heads.shifts).view(units.bundles, units.members)
        held = range(sum(units.sizes))[self._mine]
        parts = []
        for residue in range(r):
            here = [u for u in held if u // units.bundles == residue]
            rules = [
                Rule("pair", r, shift) for u in here for shift in shifts[u % units.bundles].tolist()
            ]
            for of in head_groups(rules, len(here)) if here else ():
                begin = here[0] - held.start
                kv = slice(of.kv.start + begin, of.kv.stop + begin, of.kv.step)
                for members, rule in of.members:
                    band = self._band((residue + rule.shift) % r, residue)
                    parts.append(Part(ALL, ALL, kv, kv, members, *band))
        return parts

    def _band(self, of_queries: int, of_keys: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pad sees nothing and is seen by nobody; all three rise, as kernels like it."""
        seqlen = self.units.layout.seqlen
        counted = torch.arange(self._length) * self.units.heads.dilation
        q_idx, k_idx = counted + of_queries, counted + of_keys
        q_lo = document_starts(self.cu_seqlens, q_idx.clamp_max(seqlen - 1), seqlen)
        return q_idx, q_lo.masked_fill(q_idx >= seqlen, seqlen + 1), k_idx.clamp_max(seqlen)


class SwappedUnits(torch.autograd.Function):
    """Units over an all-to-all that was posted before; kept: the units' q, k, v, out and lse.

    q `[b, s_local, h, d]`, the units' heads; out is like q.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, exchange: UnitSwap, pending: Pending
    ) -> Tensor:
        lanes = exchange.lanes(pending)
        scale, operator = exchange.softmax_scale, exchange.operator
        out, lse = banded_fwd(*lanes, exchange.parts(), scale, impl=operator)
        out = out.to(q.dtype)
        ctx.save_for_backward(*lanes, out, lse)
        ctx.exchange, ctx.nheads_kv = exchange, k.shape[2]
        return exchange.outputs(out)

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        exchange, units = ctx.exchange, ctx.exchange.units
        dout_ = exchange.at_units(exchange.to_units(dout, units.members), units.members)
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        scale, parts = exchange.softmax_scale, exchange.parts()
        row, operator = (out, lse), exchange.operator
        dk, dv = banded_bwd(dout_, q, k, v, row, parts, dq, scale, impl=operator)
        dx = torch.cat((dq, dk[:, :, :, None], dv[:, :, :, None]), 3)
        # A gradient with one source is rounded once, whether here or at home.
        dx = dx if units.repeats else dx.to(q.dtype)
        heads = len(units.heads.shifts)
        sizes = [heads, units.bundles, units.bundles]
        dx = exchange.at_tokens(exchange.to_tokens(dx), units.members + 2, sum(sizes))
        dq, *dkv = dx.split(sizes, 2)
        of_bundle, shape = units.bundle_kv_heads.to(k.device), (*dq.shape[:2], ctx.nheads_kv, -1)
        home = [
            dx.new_zeros(*shape[:3], dq.shape[3]).index_add_(2, of_bundle, grad).to(k.dtype)
            for grad in dkv
        ]
        return dq.to(q.dtype), *home, None, None


def reference_units(exchange: UnitSwap, pending: Pending) -> Tensor:
    """Dense maths on the units, gradients by autograd: what `SwappedUnits` must meet."""
    q, k, v = exchange.lanes(pending)
    # Every exchange's result must be in the output, also where a rank has no units.
    out = q * 0
    for part in exchange.parts():
        own = (ALL, part.keys, part.held)
        mask = visible(part.q_hi, part.q_lo, part.k_idx).to(q.device)
        done, _ = full_partial(part.queries(q), k[own], v[own], mask, exchange.softmax_scale)
        where = (ALL, part.rows, part.kv, part.members)
        out = out.clone()
        out[where] = done.to(q.dtype).view(out[where].shape)
    return exchange.outputs(out)


def swap_bytes(rules: Sequence[Rule], shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends for the dilated rules among `rules`, one a query head of `shape`.

    Forward its tokens' lanes to others' units and its units' outputs to others' tokens; backward
    the gradients of both the other way, those of the lanes in the wider of fp32 and their dtype
    where a key is sent twice.
    """
    cp = layout.cp_size
    forward, backward = [0] * cp, [0] * cp
    for heads in dilated_heads(rules):
        units = Units(heads, shape.nheads // shape.nheads_kv, layout)
        slots = [units.slots(rank) for rank in range(cp)]
        lane = shape.batch * shape.head_dim * shape.itemsize
        home = shape.batch * shape.head_dim * max(4 if units.repeats else 0, shape.itemsize)
        for rank, size in enumerate(units.sizes):
            to_units = slots[rank] * (sum(units.sizes) - size)
            to_tokens = (sum(slots) - slots[rank]) * size
            forward[rank] += ((units.members + 2) * to_units + units.members * to_tokens) * lane
            backward[rank] += units.members * to_units * lane
            backward[rank] += (units.members + 2) * to_tokens * home
    return Traffic(tuple(forward), tuple(backward))

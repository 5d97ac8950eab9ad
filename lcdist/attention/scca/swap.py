"""Shifted dilated attention under context parallelism: an all-to-all over (head, residue) units.

The queries, keys and values of a unit (`units.py`) travel together to one rank. That rank sorts
them, computes them as a causal problem of seqlen / r tokens, and sends the outputs back. This is
the exchange of DeepSpeed-Ulysses (arXiv:2309.14509) with r times as many heads (arXiv:2312.07305).
A rank sends equally many rows of every residue; missing tokens are padding, which sees nothing and
is not seen. Where a key head has several bundles, its keys are sent to each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.attention.scca.unit_tables import (
    UnitTables,
    key_heads,
    make_unit_parts,
    make_unit_tables,
    rows_per_rank,
)
from lcdist.attention.scca.units import UnitLayout, dilated_heads
from lcdist.attention.shape import Shape, Traffic
from lcdist.exchange import Pending, swap
from lcdist.layout import ContextLayout
from lcdist_kernels.full import AttentionImpl, full_partial, visible
from lcdist_kernels.scca import Parts, Rule, banded_bwd, banded_fwd
from lcdist_kernels.tape import kept


@dataclass(frozen=True, eq=False)
class UnitSwap:
    """All-to-all of the units of heads of one dilation, seen from one rank.

    Args:
        units: the units of all ranks.
        block_impl: computes the units.
        ctx: arguments of the attention call.
    """

    units: UnitLayout
    block_impl: AttentionImpl
    ctx: AttentionContext

    @cached_property
    def parts(self) -> Parts:
        """The work on this rank's units."""
        return make_unit_parts(self.units, self.ctx.rank, self.ctx.documents)

    def _tables(self, num_columns: int, x: Tensor) -> UnitTables:
        return make_unit_tables(self.units, self.ctx.rank, num_columns, x.device)

    def send_to_units(self, x: Tensor, num_columns: int) -> Pending:
        """Post the first `num_columns` columns of `[b, s_local, heads, d]` to the units' ranks."""
        units_per_rank, head_dim = self.units.units_per_rank, x.shape[3]
        x = self._tables(num_columns, x).select(x, self.units.heads.dilation)
        x = x.reshape(*x.shape[:2], sum(units_per_rank), num_columns * head_dim)
        return swap(
            x,
            1,
            2,
            self.ctx.group,
            shard_sizes=rows_per_rank(self.units),
            full_sizes=units_per_rank,
        )

    def receive_units(self, pending: Pending, num_columns: int) -> Tensor:
        """Return received tensors: `[b, ceil(seqlen / r), own units, num_columns, d]`."""
        x = pending.wait()
        batch, num_rows, num_units, width = x.shape
        x = x.reshape(batch, num_rows, num_units * num_columns, width // num_columns)
        x = self._tables(num_columns, x).sort(x)
        return x.reshape(*x.shape[:2], num_units, num_columns, x.shape[3])

    def send_to_tokens(self, x: Tensor) -> Pending:
        """Post a tensor shaped as `receive_units` returns it to the tokens' ranks."""
        num_units, num_columns = x.shape[2:4]
        x = self._tables(num_columns, x).unsort(x.flatten(2, 3))
        x = x.reshape(*x.shape[:2], num_units, num_columns * x.shape[3])
        return swap(
            x,
            2,
            1,
            self.ctx.group,
            shard_sizes=self.units.units_per_rank,
            full_sizes=rows_per_rank(self.units),
        )

    def receive_tokens(self, pending: Pending, num_columns: int) -> Tensor:
        """Return the received heads of own tokens: `[b, s_local, heads, d]`."""
        x = pending.wait()
        batch, num_rows, num_units, width = x.shape
        x = x.reshape(batch, num_rows, num_units * num_columns, width // num_columns)
        return self._tables(num_columns, x).unselect(x, self.units.heads.dilation)

    def post(self, q: Tensor, k: Tensor, v: Tensor) -> Pending:
        """Post the units' queries `[b, s_local, h, d]` and the keys and values that they need.

        All are rotated; differentiable.
        """
        if self.units.duplicates_keys or k.shape[2] != self.units.num_bundles:
            heads = key_heads(self.units, k.device)
            k, v = k.index_select(2, heads), v.index_select(2, heads)
        return self.send_to_units(torch.cat((q, k, v), 2), self.units.num_columns)

    def receive_qkv(self, pending: Pending) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries, keys and values of this rank's units."""
        x = self.receive_units(pending, self.units.num_columns)
        q, k, v = x.split([self.units.bundle_size, 1, 1], 3)
        return q, k.squeeze(3), v.squeeze(3)

    def return_outputs(self, out: Tensor) -> Tensor:
        """Send the units' outputs to the tokens' ranks; return those of own tokens."""
        return self.receive_tokens(self.send_to_tokens(out), self.units.bundle_size)

    def gradients(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> Tensor:
        """Return the gradients of the units' columns, q, k and v, as they travel back."""
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        rows, scale = (out, lse), self.ctx.softmax_scale
        dk, dv = banded_bwd(dout, q, k, v, rows, self.parts, dq, scale, impl=self.block_impl)
        dx = torch.cat((dq, dk[:, :, :, None], dv[:, :, :, None]), 3)
        # A gradient with one source is rounded once, whether here or after the exchange.
        return dx if self.units.duplicates_keys else dx.to(q.dtype)

    def sum_bundles(self, grad: Tensor, nheads_kv: int) -> Tensor:
        """Return the gradient of `nheads_kv` key heads from that of the bundles' key heads."""
        total = grad.new_zeros(*grad.shape[:2], nheads_kv, grad.shape[3])
        return total.index_add_(2, key_heads(self.units, grad.device), grad)


class SwappedUnits(torch.autograd.Function):
    """Units over all-to-alls that are already posted; saves the units' q, k, v, out and lse.

    Arguments k, v, exchanges, pending, then the queries `[b, s_local, h, d]` of each exchange; the
    outputs are like the queries. The results of one exchange travel while the units of the next
    are computed, in both passes.
    """

    @staticmethod
    def forward(
        node: Any,
        k: Tensor,
        v: Tensor,
        exchanges: Sequence[UnitSwap],
        pending: Sequence[Pending],
        *queries: Tensor,
    ) -> tuple[Tensor, ...]:
        results = kept(lambda: _run_units(exchanges, pending))
        outputs, saved = results[: len(exchanges)], results[len(exchanges) :]
        node.save_for_backward(*saved)
        node.exchanges, node.nheads_kv = exchanges, k.shape[2]
        return outputs

    @staticmethod
    def backward(node: Any, *douts: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        exchanges: Sequence[UnitSwap] = node.exchanges
        # Read once: each reading may copy or compute the tensors again.
        saved = node.saved_tensors
        pending = [
            exchange.send_to_units(dout, exchange.units.bundle_size)
            for exchange, dout in zip(exchanges, douts, strict=True)
        ]
        sent = []
        for i, (exchange, arriving) in enumerate(zip(exchanges, pending, strict=True)):
            dout = exchange.receive_units(arriving, exchange.units.bundle_size)
            dx = exchange.gradients(dout, *saved[5 * i : 5 * (i + 1)])
            sent.append(exchange.send_to_tokens(dx))
        dqs: list[Tensor] = []
        dkv: list[Tensor] = []
        for exchange, arriving in zip(exchanges, sent, strict=True):
            units, dtype = exchange.units, saved[0].dtype
            dx = exchange.receive_tokens(arriving, units.num_columns)
            sizes = [len(units.heads.shifts), units.num_bundles, units.num_bundles]
            dq, *grads = dx.split(sizes, 2)
            dqs.append(dq.to(dtype))
            grads = [exchange.sum_bundles(grad, node.nheads_kv).to(dtype) for grad in grads]
            dkv = [x + y for x, y in zip(dkv, grads, strict=True)] if dkv else grads
        return *dkv, None, None, *dqs


def _run_units(exchanges: Sequence[UnitSwap], pending: Sequence[Pending]) -> list[Tensor]:
    """Return the outputs of own tokens of each exchange, then its units' q, k, v, out and lse."""
    saved, sent = list[Tensor](), []
    for exchange, arriving in zip(exchanges, pending, strict=True):
        qkv, scale = exchange.receive_qkv(arriving), exchange.ctx.softmax_scale
        out, lse = banded_fwd(*qkv, exchange.parts, scale, impl=exchange.block_impl)
        out = out.to(qkv[0].dtype)
        saved += [*qkv, out, lse]
        sent.append(exchange.send_to_tokens(out))
    outputs = [
        exchange.receive_tokens(arriving, exchange.units.bundle_size)
        for exchange, arriving in zip(exchanges, sent, strict=True)
    ]
    return [*outputs, *saved]


def reference_units(exchange: UnitSwap, pending: Pending) -> Tensor:
    """Compute the units with dense maths, gradients by autograd.

    `SwappedUnits` is tested against it.
    """
    q, k, v = exchange.receive_qkv(pending)
    # Every exchange's result must enter the output, also on a rank without units.
    out = q * 0
    for part in exchange.parts:
        k_part, v_part = k[:, part.keys, part.k_heads], v[:, part.keys, part.k_heads]
        mask = visible(part.q_hi, part.q_lo, part.k_idx).to(q.device)
        scale = exchange.ctx.softmax_scale
        rows, _ = full_partial(part.queries(q), k_part, v_part, mask, scale)
        out = out.clone()
        own = out[:, part.rows, part.kv, part.members]
        own.copy_(rows.to(q.dtype).view(own.shape))
    return exchange.return_outputs(out)


def unit_bytes(rules: Sequence[Rule], shape: Shape, layout: ContextLayout) -> int:
    """Count what `SwappedUnits` keeps on the fullest rank: its outputs; q, k, v, out and lse."""
    kept, row = 0, shape.head_dim * shape.itemsize
    for heads in dilated_heads(rules):
        units = UnitLayout(heads, shape.nheads // shape.nheads_kv, layout)
        unit = (units.num_columns + units.bundle_size) * row
        unit += units.bundle_size * max(4, shape.itemsize)
        rows = -(-layout.seqlen // heads.dilation)
        kept += max(units.units_per_rank) * rows * unit
        kept += layout.local_seqlen * len(heads.shifts) * row
    return shape.batch * kept


def swap_bytes(rules: Sequence[Rule], shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends for the dilated rules among `rules`, one per query head.

    Forward: its tokens' columns to other ranks' units, and its units' outputs to other ranks'
    tokens. Backward: the gradients of both in the opposite direction. Gradients of the columns
    travel in the wider of fp32 and their dtype if a key is sent twice.
    """
    cp = layout.cp_size
    forward, backward = [0] * cp, [0] * cp
    for heads in dilated_heads(rules):
        units = UnitLayout(heads, shape.nheads // shape.nheads_kv, layout)
        rows, per_rank = [units.num_rows(rank) for rank in range(cp)], units.units_per_rank
        all_rows, all_units = sum(rows), sum(per_rank)
        column = shape.batch * shape.head_dim * shape.itemsize
        grad_size = max(4 if units.duplicates_keys else 0, shape.itemsize)
        grad_column = shape.batch * shape.head_dim * grad_size
        for rank, num_units in enumerate(per_rank):
            to_units = rows[rank] * (all_units - num_units)
            to_tokens = (all_rows - rows[rank]) * num_units
            forward[rank] += units.num_columns * to_units * column
            forward[rank] += units.bundle_size * to_tokens * column
            backward[rank] += units.bundle_size * to_units * column
            backward[rank] += units.num_columns * to_tokens * grad_column
    return Traffic(tuple(forward), tuple(backward))

"""Row tables and work lists of (head, residue) units, made once per layout and documents."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lcdist.attention.scca.shift_plan import Documents
from lcdist.attention.scca.units import UnitLayout
from lcdist.attention.shared.plan_cache import cached_plan
from lcdist_kernels.common import document_starts
from lcdist_kernels.scca import Part, Parts, Rule, head_groups

ALL = slice(None)


class _Select(torch.autograd.Function):
    """`index_select` whose gradient is selected by the inverse numbers, not added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.dim, ctx.inverse = dim, inverse
        return x.index_select(dim, rows)

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return dout.index_select(ctx.dim, ctx.inverse), None, None, None


class Rearrangement(NamedTuple):
    """Row numbers that rearrange one dim of a tensor, and those of the inverse.

    Padding takes row 0; its values are never used. None: all rows stay where they are.
    """

    rows: Tensor | None
    inverse: Tensor | None

    def apply(self, x: Tensor, dim: int) -> Tensor:
        if self.rows is None:
            return x
        return _Select.apply(x, dim, self.rows, self.inverse)

    def undo(self, x: Tensor, dim: int) -> Tensor:
        if self.rows is None:
            return x
        return _Select.apply(x, dim, self.inverse, self.rows)


def make_rearrangement(rows: Tensor, size: int, device: torch.device) -> Rearrangement:
    """Return the rearrangement of a dim of `size` entries.

    rows: numbers below `size`, each at most once, negative for padding; missing ones become padding
    in the inverse.
    """
    if len(rows) == size and torch.equal(rows, torch.arange(size)):
        return Rearrangement(None, None)
    valid = (rows >= 0).nonzero().flatten()
    inverse = torch.zeros(size, dtype=torch.int64)
    inverse[rows[valid]] = valid
    return Rearrangement(rows.clamp_min(0).to(device), inverse.to(device))


class UnitTables(NamedTuple):
    """Rearrangements of one rank's tensors for a swap of units.

    send_tokens: local tokens -> rows (row of a residue, residue).
    send_columns: (residue, head) -> columns of all units.
    group_columns: columns of own units -> columns grouped by equal order of received rows.
    group_sizes: columns in each of these groups.
    group_orders: per group, received rows -> global order of tokens.
    """

    send_tokens: Rearrangement
    send_columns: Rearrangement
    group_columns: Rearrangement
    group_sizes: list[int]
    group_orders: list[Rearrangement]

    def select(self, x: Tensor, num_residues: int) -> Tensor:
        """`[b, s_local, heads, d]` -> `[b, rows, columns of all units, d]`."""
        x = self.send_tokens.apply(x, 1)
        x = x.reshape(len(x), -1, num_residues * x.shape[2], x.shape[3])
        return self.send_columns.apply(x, 2)

    def unselect(self, x: Tensor, num_residues: int) -> Tensor:
        """Inverse of `select`."""
        x = self.send_columns.undo(x, 2)
        x = x.reshape(len(x), x.shape[1] * num_residues, -1, x.shape[3])
        return self.send_tokens.undo(x, 1)

    def sort(self, x: Tensor) -> Tensor:
        """`[b, received rows, own columns, d]` -> `[b, length, own columns, d]` in global order."""
        return self._by_group(x, [order.apply for order in self.group_orders])

    def unsort(self, x: Tensor) -> Tensor:
        """Inverse of `sort`."""
        return self._by_group(x, [order.undo for order in self.group_orders])

    def _by_group(self, x: Tensor, reorder: Sequence[Callable[[Tensor, int], Tensor]]) -> Tensor:
        if len(reorder) == 1:
            return reorder[0](x, 1)
        groups = self.group_columns.apply(x, 2).split(self.group_sizes, 2)
        parts = [fn(group, 1) for fn, group in zip(reorder, groups, strict=True)]
        return self.group_columns.undo(torch.cat(parts, 2), 2)


@cached_plan
def make_unit_tables(
    units: UnitLayout, rank: int, num_columns: int, device: torch.device
) -> UnitTables:
    """Return the rearrangements for the first `num_columns` columns of every unit.

    The tensor that is sent holds the heads of these columns alone: all query heads, or also the
    keys and values.
    """
    r = units.heads.dilation
    tokens = units.residue_tokens(rank).T.flatten()
    residues, heads = units.column_residues[:, :num_columns], units.column_heads[:, :num_columns]
    num_heads = residues.numel() // r
    columns = (residues * num_heads + heads).flatten()

    own = units.units_of(rank)
    own_residues = residues[own.start : own.stop].flatten()
    order = units.global_order()
    num_received = sum(units.num_rows(peer) for peer in range(units.layout.cp_size))
    # Residues whose received rows are in the same order: all of them, if shards are aligned.
    distinct, group_of_residue = order.unique(dim=0, return_inverse=True)
    by_group = group_of_residue[own_residues].argsort(stable=True)
    sizes = group_of_residue[own_residues].bincount(minlength=len(distinct)).tolist()
    return UnitTables(
        make_rearrangement(tokens, units.layout.local_seqlen, device),
        make_rearrangement(columns, r * num_heads, device),
        make_rearrangement(by_group, len(own_residues), device),
        sizes,
        [make_rearrangement(rows, num_received, device) for rows in distinct],
    )


@cached_plan
def rows_per_rank(units: UnitLayout) -> list[int]:
    """Return the rows that each rank sends per residue."""
    return [units.num_rows(rank) for rank in range(units.layout.cp_size)]


@cached_plan
def key_heads(units: UnitLayout, device: torch.device) -> Tensor:
    """Return the key head of each bundle, int64 on the device."""
    return torch.tensor(units.bundle_kv_heads).to(device)


@cached_plan
def make_unit_parts(units: UnitLayout, rank: int, documents: Documents) -> Parts:
    """Return the work on one rank's units."""
    r, own = units.heads.dilation, units.units_of(rank)
    shifts = torch.tensor(units.heads.shifts).view(units.num_bundles, units.bundle_size)
    parts = Parts()
    for residue in range(r):
        current = [u for u in own if u // units.num_bundles == residue]
        rules = [
            Rule("pair", r, shift)
            for u in current
            for shift in shifts[u % units.num_bundles].tolist()
        ]
        for heads in head_groups(rules, len(current)) if current else ():
            begin = current[0] - own.start
            kv = slice(heads.kv.start + begin, heads.kv.stop + begin, heads.kv.step)
            for members, rule in heads.members:
                band = _unit_band(units, documents, (residue + rule.shift) % r, residue)
                parts.append(Part(ALL, ALL, kv, kv, members, *band))
    return parts


def _unit_band(
    units: UnitLayout, documents: Documents, query_residue: int, key_residue: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q_hi, q_lo, k_idx), all increasing; padding sees nothing and is not seen."""
    seqlen, r = units.layout.seqlen, units.heads.dilation
    multiples = torch.arange(-(-seqlen // r)) * r
    q_ids, k_ids = multiples + query_residue, multiples + key_residue
    borders = None if documents is None else torch.tensor(documents)
    q_lo = document_starts(borders, q_ids.clamp_max(seqlen - 1), seqlen)
    return q_ids, q_lo.masked_fill(q_ids >= seqlen, seqlen + 1), k_ids.clamp_max(seqlen)

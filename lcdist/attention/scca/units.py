"""Which rank of shifted dilated attention computes what: (head, residue) units and their tokens.

Under dilation r and shift s, the queries at i = rho (mod r) see the keys at j = rho - s (mod r)
that are not after them: r independent causal problems a head, whatever the layout
(arXiv:2312.07305). A unit is a bundle of query heads of one key head and a residue of keys.
Residues are those of global token numbers, packed documents included: i - j does not know where a
document begins, and the band of a problem keeps inside it.

A bundle holds all query heads of a key head, or fewer where ranks would have nothing to do; a rank
may still hold more units than another, or none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.layout import ContextLayout
from lcdist_kernels.scca import Rule


class DilatedHeads(NamedTuple):
    """Query heads first, first + 1, ... of a tensor, of one dilation; shifts: one a head."""

    first: int
    dilation: int
    shifts: tuple[int, ...]


def dilated_heads(rules: Sequence[Rule]) -> list[DilatedHeads]:
    """The heads of dilated rules among `rules`, one a query head, by dilation."""
    found: list[DilatedHeads] = []
    for head, rule in enumerate(rules):
        if rule.kind != "pair":
            continue
        last = found[-1] if found else None
        if last and last.dilation == rule.size and last.first + len(last.shifts) == head:
            found[-1] = last._replace(shifts=(*last.shifts, rule.shift))
        else:
            found.append(DilatedHeads(head, rule.size, (rule.shift,)))
    return found


@dataclass(frozen=True)
class Units:
    """Which unit is where, for heads of one dilation, `group_size` query heads to a key head.

    Unit u is residue u // bundles of keys and bundle u % bundles. It has `members` query heads, a
    key and a value: its lanes, in this order.
    """

    heads: DilatedHeads
    group_size: int
    layout: ContextLayout

    @cached_property
    def members(self) -> int:
        """Query heads of a bundle: as many as leave every rank a unit, or one."""
        kv = self.kv_heads
        whole = gcd(*(kv.count(number) for number in kv))
        enough = -(-self.layout.cp_size // self.heads.dilation)
        fits = [n for n in range(1, whole + 1) if whole % n == 0 and len(kv) // n >= enough]
        return max(fits, default=1)

    @cached_property
    def kv_heads(self) -> list[int]:
        """The key head of each query head."""
        heads = range(self.heads.first, self.heads.first + len(self.heads.shifts))
        return [head // self.group_size for head in heads]

    @cached_property
    def bundle_kv_heads(self) -> Tensor:
        """The key head of each bundle: int64 `[bundles]`, on the CPU."""
        return torch.tensor(self.kv_heads[:: self.members])

    @cached_property
    def repeats(self) -> bool:
        """Whether a key head has several bundles, so that its keys are sent to each."""
        return len(set(self.kv_heads)) < self.bundles

    @property
    def bundles(self) -> int:
        """How many there are of each residue."""
        return len(self.heads.shifts) // self.members

    @property
    def sizes(self) -> list[int]:
        """How many units each rank holds."""
        units, cp = self.bundles * self.heads.dilation, self.layout.cp_size
        return [units // cp + (rank < units % cp) for rank in range(cp)]

    @cached_property
    def residues(self) -> Tensor:
        """Of the tokens in each lane, `[units, members + 2]`."""
        r, shifts = self.heads.dilation, torch.tensor(self.heads.shifts)
        of_keys = torch.arange(r)[:, None, None].expand(r, self.bundles, 2)
        of_queries = of_keys[..., :1] + shifts.view(self.bundles, self.members)
        return torch.cat((of_queries % r, of_keys), -1).flatten(0, 1)

    @cached_property
    def lane_heads(self) -> Tensor:
        """Which head of the query heads, then a key a bundle, then a value, is in each lane."""
        bundle = torch.arange(self.bundles)[:, None]
        queries = torch.arange(len(self.heads.shifts)).view(self.bundles, self.members)
        after = len(self.heads.shifts) + bundle
        lanes = torch.cat((queries, after, after + self.bundles), 1)
        return lanes.repeat(self.heads.dilation, 1)

    def slots(self, rank: int) -> int:
        """Tokens of a residue that `rank` sends: as many as its commonest has, the rest is pad."""
        r = self.heads.dilation
        return int((self.layout.positions(rank) % r).bincount(minlength=r).max())

    def tokens(self, rank: int) -> Tensor:
        """Local numbers of the tokens of each residue, `[dilation, slots]`; -1 is pad."""
        residue = self.layout.positions(rank) % self.heads.dilation
        table = torch.full((self.heads.dilation, self.slots(rank)), -1)
        for r in range(self.heads.dilation):
            own = (residue == r).nonzero().flatten()
            table[r, : len(own)] = own
        return table

    def arrivals(self) -> Tensor:
        """Where the tokens of each residue arrive, in global order, `[dilation, ...]`; -1 is pad.

        Slots are counted over all ranks, in rank order.
        """
        r, ranks = self.heads.dilation, range(self.layout.cp_size)
        at = torch.cat([self.layout.positions(p)[self.tokens(p)] for p in ranks], 1)
        pad = torch.cat([self.tokens(p) < 0 for p in ranks], 1)
        order = at.masked_fill(pad, self.layout.seqlen).argsort(1)[:, : -(-self.layout.seqlen // r)]
        return order.masked_fill(pad.gather(1, order), -1)

"""Distribution of shifted dilated attention over ranks: (head, residue) units and their tokens.

Under dilation r and shift s, the queries at i = rho (mod r) see the keys at j = rho - s (mod r)
that are not after them. So a head is r independent causal problems, whatever the layout
(arXiv:2312.07305). A unit is one residue of keys and a bundle of query heads that share a key head.
Residues are those of global token numbers, also with packed documents: i - j does not depend on
the document's start, and each problem's band stays inside the document.

A bundle holds all query heads of a key head, or fewer if some ranks would have no unit otherwise.
A rank may still hold more units than another, or none.

A unit's tensors have columns: its query heads, then one key head, then one value head. Rows are the
tokens of one residue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.layout import ContextLayout
from lcdist_kernels.scca import Rule


class DilatedHeads(NamedTuple):
    """Consecutive query heads of one dilation, from number `first` on; shifts: one per head."""

    first: int
    dilation: int
    shifts: tuple[int, ...]


def dilated_heads(rules: Sequence[Rule]) -> list[DilatedHeads]:
    """Return the heads of dilated rules among `rules`, one per query head, by dilation."""
    result: list[DilatedHeads] = []
    for head, rule in enumerate(rules):
        if rule.kind != "pair":
            continue
        last = result[-1] if result else None
        if last and last.dilation == rule.size and last.first + len(last.shifts) == head:
            result[-1] = last._replace(shifts=(*last.shifts, rule.shift))
        else:
            result.append(DilatedHeads(head, rule.size, (rule.shift,)))
    return result


def count_of_residue(spans: Sequence[tuple[int, int]], residue: int, dilation: int) -> int:
    """Return how many numbers in `spans` leave `residue` when divided by `dilation`."""
    return sum((b - 1 - residue) // dilation - (a - 1 - residue) // dilation for a, b in spans)


def most_of_a_residue(spans: Sequence[tuple[int, int]], dilation: int) -> int:
    """Return the numbers in `spans` of their most frequent residue."""
    # Counts rise only where a span begins.
    return max(count_of_residue(spans, start % dilation, dilation) for start, _ in spans)


@dataclass(frozen=True)
class UnitLayout:
    """Units of heads of one dilation, and their distribution over ranks.

    Unit u holds key residue u // num_bundles and bundle u % num_bundles.

    Args:
        heads: the query heads.
        group_size: query heads per key head.
        layout: layout of the sequence.
    """

    heads: DilatedHeads
    group_size: int
    layout: ContextLayout

    @cached_property
    def bundle_size(self) -> int:
        """Query heads per bundle: as many as leave every rank a unit, at least 1."""
        kv_heads = self.kv_heads
        most = gcd(*(kv_heads.count(number) for number in kv_heads))
        needed = -(-self.layout.cp_size // self.heads.dilation)
        sizes = [n for n in range(1, most + 1) if most % n == 0 and len(kv_heads) // n >= needed]
        return max(sizes, default=1)

    @cached_property
    def kv_heads(self) -> list[int]:
        """The key head of each query head."""
        heads = range(self.heads.first, self.heads.first + len(self.heads.shifts))
        return [head // self.group_size for head in heads]

    @cached_property
    def bundle_kv_heads(self) -> list[int]:
        """The key head of each bundle."""
        return self.kv_heads[:: self.bundle_size]

    @cached_property
    def duplicates_keys(self) -> bool:
        """Return whether a key head has several bundles, so that its keys are sent to each."""
        return len(set(self.kv_heads)) < self.num_bundles

    @property
    def num_bundles(self) -> int:
        """Bundles per residue."""
        return len(self.heads.shifts) // self.bundle_size

    @property
    def num_columns(self) -> int:
        """Columns of a unit: its query heads, a key head and a value head."""
        return self.bundle_size + 2

    @property
    def units_per_rank(self) -> list[int]:
        """Return the number of units of each rank."""
        units, cp = self.num_bundles * self.heads.dilation, self.layout.cp_size
        return [units // cp + (rank < units % cp) for rank in range(cp)]

    def units_of(self, rank: int) -> range:
        """Return the numbers of a rank's units."""
        ends = [0, *accumulate(self.units_per_rank)]
        return range(ends[rank], ends[rank + 1])

    @cached_property
    def column_residues(self) -> Tensor:
        """The residue of the tokens in each column: `[units, num_columns]`."""
        r, shifts = self.heads.dilation, torch.tensor(self.heads.shifts)
        keys = torch.arange(r)[:, None, None].expand(r, self.num_bundles, 2)
        queries = keys[..., :1] + shifts.view(self.num_bundles, self.bundle_size)
        return torch.cat((queries % r, keys), -1).flatten(0, 1)

    @cached_property
    def column_heads(self) -> Tensor:
        """The head in each column, `[units, num_columns]`.

        Heads are numbered as in cat(all query heads, a key head per bundle, a value head per
        bundle).
        """
        bundles = torch.arange(self.num_bundles)[:, None]
        num_queries = len(self.heads.shifts)
        queries = torch.arange(num_queries).view(self.num_bundles, self.bundle_size)
        keys = num_queries + bundles
        columns = torch.cat((queries, keys, keys + self.num_bundles), 1)
        return columns.repeat(self.heads.dilation, 1)

    def num_rows(self, rank: int) -> int:
        """Return the rows that `rank` sends per residue: the count of its most frequent one."""
        return most_of_a_residue(self.layout.spans(rank), self.heads.dilation)

    def residue_tokens(self, rank: int) -> Tensor:
        """Return the local token numbers of each residue: `[dilation, num_rows]`; padding is -1."""
        residues = self.layout.positions(rank) % self.heads.dilation
        table = torch.full((self.heads.dilation, self.num_rows(rank)), -1)
        for residue in range(self.heads.dilation):
            tokens = (residues == residue).nonzero().flatten()
            table[residue, : len(tokens)] = tokens
        return table

    def global_order(self) -> Tensor:
        """Return the received rows of each residue in global order of tokens; padding is -1.

        Rows are counted over all ranks, in rank order. Shape `[dilation, ceil(seqlen / dilation)]`.
        """
        r, ranks = self.heads.dilation, range(self.layout.cp_size)
        tokens = [self.residue_tokens(rank) for rank in ranks]
        ids = torch.cat([self.layout.positions(rank)[tokens[rank]] for rank in ranks], 1)
        padding = torch.cat(tokens, 1) < 0
        length = -(-self.layout.seqlen // r)
        order = ids.masked_fill(padding, self.layout.seqlen).argsort(1)[:, :length]
        return order.masked_fill(padding.gather(1, order), -1)

"""Decoding cache of SCCA's patterns: only keys that a later query can still see.

Under a window rule the queries of a chunk see the keys of one window. Keys that no later chunk sees
are dropped at the end of a chunk. So `fixed` keeps at most one and a half chunks a head, and `flow`
at most half of the longest text, as each later chunk sees one earlier chunk. The dilated patterns
see every distance and keep all keys, but `sda_key` only those of its residue.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lcdist.attention.cache import CacheSpec, NewTokens, SoftmaxCache, row_calls
from lcdist.attention.scca.pattern import held_rules
from lcdist.attention.shared.key_value_cache import block_impl, join_rows, nothing_seen
from lcdist.attention.shared.token_store import TokenStore
from lcdist_kernels.full import AttentionImpl
from lcdist_kernels.scca import HeadGroup, Rule, head_groups


class PatternCache(SoftmaxCache):
    """Keeps rotated keys and values, in a store for each group of key heads with the same rules."""

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        self._groups: list[_GroupStore] = []
        self._nheads = 0

    @property
    def nbytes(self) -> int:
        return sum(group.store.nbytes for group in self._groups)

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        self._nheads = q.shape[2]
        return self.rotate(q, positions)

    def keep(self, k: Tensor, v: Tensor, positions: Tensor, new: NewTokens) -> None:
        if not self._groups:
            rules = held_rules(self.spec.options, self.spec.heads, self._nheads)
            self._groups = [
                _GroupStore(group, k.shape[2], self.spec, self.page)
                for group in head_groups(rules, k.shape[2])
            ]
        k, here = self.rotate(k, positions), self.keeps(positions, new)
        for group in self._groups:
            for i, row in enumerate(new.rows):
                group.keep(row, positions[i], here[i], k[i : i + 1], v[i : i + 1])

    def partial(self, queries: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        impl = block_impl(self.spec.impl, queries)
        results = []
        for row, positions, q in row_calls(new, queries):
            out, lse = nothing_seen(q)
            for group in self._groups:
                group.attend(row, positions, q, (out, lse), impl)
                group.forget(row, int(positions[0]), int(positions[-1]) + 1)
            results.append((out, lse))
        return join_rows(results)


class _GroupStore:
    """Keys and values of some key heads, whose query heads follow the same rules.

    nheads_kv: key heads of the layer on this rank.
    """

    def __init__(self, group: HeadGroup, nheads_kv: int, spec: CacheSpec, page: int) -> None:
        self._group, self._nheads_kv = group, nheads_kv
        self._scale, self._capacity = spec.softmax_scale, spec.capacity
        self._rules = [rule for _, rule in group.members]
        self.store = TokenStore(spec.rows, spec.held(page), grows=True)

    def keep(self, row: int, positions: Tensor, here: Tensor, k: Tensor, v: Tensor) -> None:
        """Append the new tokens of a row that a query will see: k, v `[1, n, h_kv, d]`.

        here: which of them this rank keeps, bool `[n]`.
        """
        here = here & self._needed(positions, int(positions[0]))
        if here.any():
            index = here.nonzero().flatten()
            part = slice(None) if here.all() else index.to(k.device)
            k, v = (x[:, :, self._group.kv][:, part] for x in (k, v))
            self.store.append(row, positions[index], k, v)

    def attend(
        self,
        row: int,
        positions: Tensor,
        q: Tensor,
        result: tuple[Tensor, Tensor],
        impl: AttentionImpl,
    ) -> None:
        """Write the partial of a row's queries `[1, n, h, d]` over what is kept into `result`."""
        if not self.store.length(row):
            return
        k, v = self.store.read(row)
        k_ids, kv = self.store.positions(row), self._group.kv
        q, out = (x.unflatten(2, (self._nheads_kv, -1)) for x in (q, result[0]))
        lse = result[1].unflatten(1, (self._nheads_kv, -1))
        for members, rule in self._group.members:
            first, last = rule.limits(positions)
            for rows, keys in _reads(rule, positions, k_ids):
                part = q[:, rows, kv, members]
                band = last[rows], first[rows], k_ids[keys]
                part_out, part_lse = impl.fwd(
                    part.flatten(2, 3), k[:, keys], v[:, keys], *band, self._scale
                )
                out[:, rows, kv, members] = part_out.view(part.shape)
                heads = lse[:, kv, members]
                heads[..., rows] = part_lse.view(*heads.shape[:3], -1)

    def forget(self, row: int, start: int, stop: int) -> None:
        """Drop keys that no query from position `stop` on sees.

        start: position of the first token of the call; which keys are needed changes only at the
        end of a window.
        """
        if any(
            _window_number(rule, start - 1) != _window_number(rule, stop) for rule in self._rules
        ):
            kept = self._needed(self.store.positions(row), stop)
            if not kept.all():
                self.store.retain(row, kept)

    def _needed(self, positions: Tensor, start: int) -> Tensor:
        """Return which keys a query from position `start` on sees: bool, like `positions`."""
        readers = [_last_reader(rule, positions, self._capacity) for rule in self._rules]
        return torch.stack(readers).amax(0) >= start


def _window_number(rule: Rule, position: int) -> int:
    """Return which run of queries with the same window a position is in."""
    ahead = rule.shift if rule.kind == "split" else 0
    return (position + ahead) // rule.size if rule.is_window else 0


def _last_reader(rule: Rule, positions: Tensor, capacity: int) -> Tensor:
    """Return the last query that sees each key, or a later one that sees nothing; -1: none."""
    size, shift = rule.size, rule.shift
    if rule.kind == "pair":
        return torch.full_like(positions, capacity)
    if rule.kind == "key":
        return torch.where(positions % size == shift, capacity, -1)
    if rule.kind == "fold":
        return _last_folded(rule, capacity)[positions // size] * size + size - 1
    last = (positions + shift) // size * size + size - 1
    return last - shift if rule.kind == "split" else last


@lru_cache(maxsize=64)
def _last_folded(rule: Rule, capacity: int) -> Tensor:
    """Return the last chunk of queries that sees each chunk of keys; -2 for none."""
    chunks = torch.arange(-(-capacity // rule.size))
    seen = chunks - (rule.shift // rule.size) % (chunks + 1)
    last = torch.full_like(chunks, -2)
    return last.scatter_reduce(0, seen, chunks, "amax")


def _reads(
    rule: Rule, positions: Tensor, k_ids: Tensor
) -> list[tuple[slice | Tensor, slice | Tensor]]:
    """Return (queries, keys): which new queries read which of the keys."""
    everything = slice(None)
    if rule.is_window:
        return [(everything, everything)]
    if rule.kind == "key":
        pairs = [(everything, _residue(k_ids, rule.shift, rule.size))]
    else:
        residues = positions % rule.size
        pairs = [
            (
                everything if len(residues) == 1 else (residues == r).nonzero().flatten(),
                _residue(k_ids, (r - rule.shift) % rule.size, rule.size),
            )
            for r in residues.unique().tolist()
        ]
    return [(rows, keys) for rows, keys in pairs if len(k_ids[keys])]


def _residue(k_ids: Tensor, residue: int, size: int) -> slice | Tensor:
    """Return the keys at positions `residue` mod `size`."""
    first = int(k_ids[0])
    if int(k_ids[-1]) - first + 1 == len(k_ids):
        return slice((residue - first) % size, None, size)
    return (k_ids % size == residue).nonzero().flatten()

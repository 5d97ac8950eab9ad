"""Shifted cross chunk attention by parts: memory linear in the sequence, gradients by hand.

The work is a list of parts, each an ordinary banded attention of some queries over some keys, both
slices of what is there: nothing is rolled or gathered. Tiled torch takes a window rule in one part
for each chunk of queries over just the keys it sees (small chunks together until they fill a tile);
the kernels, which find the tiles of a band themselves, in as few parts as have ends that do not
decrease: one, but for folded shifts. A dilated rule gives one strided part for each residue
(arXiv:2312.07305; the parts' maths is that of `lcdist_kernels.full`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels import tiles
from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full.impl import TORCH_IMPL, TRITON_IMPL, AttentionImpl
from lcdist_kernels.partial import merge
from lcdist_kernels.scca.rules import HeadGroup, Rule

Partial = tuple[Tensor, Tensor]


class Part(NamedTuple):
    """Some queries of some heads over some keys: q_lo <= k_idx <= q_hi is visible.

    rows, keys: slices of the query and key tokens; kv: of q's groups of heads; held: of k's heads,
    as many; members: of each group. q_hi, q_lo, k_idx: int64 on the CPU, for rows and keys.
    """

    rows: slice
    keys: slice
    kv: slice
    held: slice
    members: slice
    q_hi: Tensor
    q_lo: Tensor
    k_idx: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """Of `[b, s, h_kv, h / h_kv, d]`: `[b, rows, heads, d]`."""
        return x[:, self.rows, self.kv, self.members].flatten(2, 3)

    def row_numbers(self, x: Tensor) -> Tensor:
        """Of `[b, h_kv, h / h_kv, s]`: `[b, heads, rows]`."""
        return x[:, self.kv, self.members, self.rows].flatten(1, 2)

    def apart(self, k: Tensor, *like_q: Tensor) -> list["Part"]:
        """The same in parts whose heads are one strided dim of each tensor like q: none is copied.

        Of the few query heads or the few key heads, one at a time.
        """
        if all(_one_dim(x[:, self.rows, self.kv, self.members]) for x in like_q):
            return [self]
        kv = range(like_q[0].shape[2])[self.kv]
        members = range(like_q[0].shape[3])[self.members]
        if len(members) < len(kv):
            return [self._replace(members=slice(m, m + 1)) for m in members]
        held = range(k.shape[2])[self.held]
        return [
            self._replace(kv=slice(i, i + 1), held=slice(j, j + 1))
            for i, j in zip(kv, held, strict=True)
        ]

    @property
    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `full_fwd` takes it."""
        return self.q_hi, self.q_lo, self.k_idx


def _one_dim(x: Tensor) -> bool:
    """Whether dims 2 and 3 of `[b, rows, kv, members, d]` are one strided dim."""
    return 1 in x.shape[2:4] or x.stride(2) == x.shape[3] * x.stride(3)


def self_parts(
    groups: Iterable[HeadGroup], starts: Tensor, impl: AttentionImpl = TORCH_IMPL
) -> list[Part]:
    """All parts of a sequence over itself, as `impl` takes them best.

    starts: the first token of each token's document.
    """
    index, parts = torch.arange(len(starts)), []
    for group in groups:
        for members, rule in group.members:
            heads = (group.kv, group.kv, members)
            if rule.is_window:
                parts += window_parts(rule, heads, index, starts, index, impl)
            elif rule.kind == "pair":
                parts += _pair_parts(rule, heads, starts)
            else:
                parts += _key_parts(rule, heads, starts)
    return parts


def window_parts(
    rule: Rule,
    heads: tuple[slice, slice, slice],
    index: Tensor,
    starts: Tensor,
    k_idx: Tensor,
    impl: AttentionImpl = TORCH_IMPL,
) -> list[Part]:
    """The parts of a window rule, as `impl` takes them. heads: kv, held, members of a `Part`.

    index: global numbers of the queries, starts: the first tokens of their documents; k_idx: those
    of the keys, increasing.
    """
    first, last = rule.limits(index - starts)
    q_lo, q_hi = first + starts, last + starts
    runs = _rising_runs if impl is TRITON_IMPL else _runs
    return [
        Part(rows, keys, *heads, q_hi[rows], q_lo[rows], k_idx[keys])
        for rows, keys in runs(q_lo, q_hi, k_idx)
    ]


def _rising_runs(q_lo: Tensor, q_hi: Tensor, k_idx: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of queries whose first and last keys never move back, and of the keys they see."""
    falls = (q_lo[1:] < q_lo[:-1]) | (q_hi[1:] < q_hi[:-1])
    inner = (falls.nonzero().flatten() + 1).tolist()
    for row, stop in zip([0, *inner], [*inner, len(q_lo)], strict=True):
        ends = torch.stack((q_lo[row], q_hi[stop - 1] + 1))
        key, k_stop = torch.searchsorted(k_idx, ends).tolist()
        if key < k_stop:
            yield slice(row, stop), slice(key, k_stop)


def _stretches(q_lo: Tensor, q_hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries with one first key together: their first row, end row, first key and last key.

    Those that see nothing are apart from those that see something.
    """
    new, empty = torch.ones_like(q_lo, dtype=torch.bool), q_hi < q_lo
    new[1:] = (q_lo[1:] != q_lo[:-1]) | (empty[1:] != empty[:-1])
    begin = new.nonzero().flatten()
    end = torch.cat((begin[1:], begin.new_tensor([len(q_lo)])))
    # With the first key fixed, the last one never moves back.
    return begin, end, q_lo[begin], q_hi[end - 1]


def _runs(q_lo: Tensor, q_hi: Tensor, k_idx: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of queries and of the keys they see, each a chunk, or chunks that fill one tile."""
    begin, end, first, last = _stretches(q_lo, q_hi)
    k_begin = torch.searchsorted(k_idx, first).tolist()
    k_end = torch.searchsorted(k_idx, last, right=True).tolist()
    run: tuple[int, int, int, int] | None = None
    for row, stop, key, k_stop in zip(begin.tolist(), end.tolist(), k_begin, k_end, strict=True):
        if key >= k_stop:
            continue
        if run is not None:
            low, high = min(run[2], key), max(run[3], k_stop)
            if stop - run[0] <= tiles.BLOCK and high - low <= 2 * tiles.BLOCK:
                run = (run[0], stop, low, high)
                continue
            yield slice(*run[:2]), slice(*run[2:])
        run = (row, stop, key, k_stop)
    if run is not None:
        yield slice(*run[:2]), slice(*run[2:])


def _pair_parts(rule: Rule, heads: tuple[slice, slice, slice], starts: Tensor) -> Iterator[Part]:
    # i - j does not know where a document begins: residues of global numbers will do.
    index, step = torch.arange(len(starts)), rule.size
    for residue in range(min(step, len(starts))):
        rows = slice(residue, None, step)
        keys = slice((residue - rule.shift) % step, None, step)
        if len(index[keys]):
            yield Part(rows, keys, *heads, index[rows], starts[rows], index[keys])


def _key_parts(rule: Rule, heads: tuple[slice, slice, slice], starts: Tensor) -> Iterator[Part]:
    index = torch.arange(len(starts))
    begin = (index == starts).nonzero().flatten().tolist()
    for start, stop in zip(begin, [*begin[1:], len(starts)], strict=True):
        rows, keys = slice(start, stop), slice(start + rule.shift, stop, rule.size)
        if len(index[keys]):
            yield Part(rows, keys, *heads, index[rows], starts[rows], index[keys])


def banded_fwd(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], softmax_scale: float,
    before: Partial | None = None, *,
    impl: AttentionImpl = TORCH_IMPL, out_dtype: torch.dtype | None = None,
) -> Partial:  # fmt: skip
    """The partial (out like q, lse `[b, h_kv, h / h_kv, s_q]`) of q over the parts' keys.

    q `[b, s_q, h_kv, h / h_kv, d]`, rotated; no query and head may be in two of `parts`. before: a
    partial over other keys, into which this one is merged in place. In the wider of fp32 and
    q.dtype, or out in out_dtype where nothing is merged; what sees nothing has out = 0, lse = -inf.
    """
    if before is None:
        wide = wide_dtype(q.dtype)
        out = torch.zeros(q.shape, dtype=out_dtype or wide, device=q.device)
        lse = out.new_full((q.shape[0], *q.shape[2:4], q.shape[1]), -torch.inf, dtype=wide)
    else:
        out, lse = before
    direct = impl is TRITON_IMPL and before is None
    for part in _pieces(parts, impl, k, q, out):
        own = (slice(None), part.keys, part.held)
        # Kernels write where the result belongs: in `apart`'s parts that is a view.
        there = {"out": part.queries(out)} if direct else {}
        done = impl.fwd(part.queries(q), k[own], v[own], *part.band, softmax_scale, **there)
        if before is not None:
            done = merge(part.queries(out), part.row_numbers(lse), *done)
        if not direct:
            heads = out[:, part.rows, part.kv, part.members]
            heads.copy_(done[0].view(heads.shape))
        rows = lse[:, part.kv, part.members, part.rows]
        rows.copy_(done[1].view(rows.shape))
    return out, lse


def banded_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, row: Partial, parts: Sequence[Part], dq: Tensor,
    softmax_scale: float, *,
    impl: AttentionImpl = TORCH_IMPL, fresh: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The share of (dk, dv) that passes through the parts; that of dq is added to `dq`.

    dout, q, dq: as q in `banded_fwd`; row: (out, lse) over all keys that the queries see. fresh: dq
    holds nothing yet, and these are all the parts. In the wider of fp32 and q.dtype, as is dq
    unless it is fresh.
    """
    wide = wide_dtype(q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    out, lse = row
    direct = impl is TRITON_IMPL and fresh
    for part in _pieces(parts, impl, k, q, dout, out, dq):
        there = {"dq": part.queries(dq)} if direct else {}
        own = (slice(None), part.keys, part.held)
        shares = impl.bwd(
            part.queries(dout), part.queries(q), k[own], v[own], part.queries(out),
            part.row_numbers(lse), *part.band, softmax_scale, **there,
        )  # fmt: skip
        if not direct:
            heads = dq[:, part.rows, part.kv, part.members]
            heads.add_(shares[0].view(heads.shape))
        dk[own].add_(shares[1])
        dv[own].add_(shares[2])
    return dk, dv


def _pieces(
    parts: Sequence[Part], impl: AttentionImpl, k: Tensor, *like_q: Tensor
) -> Iterator[Part]:
    """Tiled torch lays heads out anew in any case; kernels take them where they are."""
    for part in parts:
        yield from part.apart(k, *like_q) if impl is TRITON_IMPL else (part,)

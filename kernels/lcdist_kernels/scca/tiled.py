"""Shifted cross chunk attention by parts: linear memory, gradients written by hand.

The work is a list of parts, each an ordinary banded attention of a slice of the queries over a
slice of the keys: nothing is rolled or gathered. Tiled torch takes a window rule as one part for
each chunk of queries over the keys it sees; small chunks are joined until they fill a tile. The
kernels find the tiles of a band themselves, so they take as few parts as have limits that do not
decrease: one, except for folded shifts. A dilated rule gives one strided part for each residue
(arXiv:2312.07305; the formulas of a part are in `lcdist_kernels.full`).
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lcdist_kernels import tiles
from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full.impl import TORCH_IMPL, TRITON_IMPL, AttentionImpl
from lcdist_kernels.partial import merge
from lcdist_kernels.scca.part import Part
from lcdist_kernels.scca.part_work import parts_bwd, parts_fwd
from lcdist_kernels.scca.pieces import rising_runs
from lcdist_kernels.scca.rules import HeadGroup, Rule

Partial = tuple[Tensor, Tensor]


def self_parts(
    groups: Iterable[HeadGroup], starts: Tensor, impl: AttentionImpl = TORCH_IMPL
) -> list[Part]:
    """Return all parts of a sequence over itself, as `impl` takes them best.

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
    """Return the parts of a window rule, as `impl` takes them best.

    Args:
        heads: kv, k_heads and members of a `Part`.
        index: global numbers of the queries. starts: the first tokens of their documents.
        k_idx: global numbers of the keys, increasing.
    """
    first, last = rule.limits(index - starts)
    q_lo, q_hi = first + starts, last + starts
    runs = _rising_runs if impl is TRITON_IMPL else _runs
    return [
        Part(rows, keys, *heads, q_hi[rows], q_lo[rows], k_idx[keys])
        for rows, keys in runs(q_lo, q_hi, k_idx)
    ]


def _rising_runs(q_lo: Tensor, q_hi: Tensor, k_idx: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of queries whose key limits do not decrease, and of the keys they see."""
    for row, stop in rising_runs(q_lo, q_hi):
        ends = torch.stack((q_lo[row], q_hi[stop - 1] + 1))
        key, k_stop = torch.searchsorted(k_idx, ends).tolist()
        if key < k_stop:
            yield slice(row, stop), slice(key, k_stop)


def _stretches(q_lo: Tensor, q_hi: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return first row, end row, first key and last key of runs of queries with one first key.

    Queries that see nothing are runs of their own.
    """
    new, empty = torch.ones_like(q_lo, dtype=torch.bool), q_hi < q_lo
    new[1:] = (q_lo[1:] != q_lo[:-1]) | (empty[1:] != empty[:-1])
    begin = new.nonzero().flatten()
    end = torch.cat((begin[1:], begin.new_tensor([len(q_lo)])))
    # With a fixed first key, the last key does not decrease.
    return begin, end, q_lo[begin], q_hi[end - 1]


def _runs(q_lo: Tensor, q_hi: Tensor, k_idx: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield slices of queries and of their keys: a chunk, or several that fill one tile."""
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
    """Yield one part for each residue of a `pair` rule."""
    # i - j does not depend on where a document begins, so global residues are exact.
    index, step = torch.arange(len(starts)), rule.size
    for residue in range(min(step, len(starts))):
        rows = slice(residue, None, step)
        keys = slice((residue - rule.shift) % step, None, step)
        if len(index[keys]):
            yield Part(rows, keys, *heads, index[rows], starts[rows], index[keys])


def _key_parts(rule: Rule, heads: tuple[slice, slice, slice], starts: Tensor) -> Iterator[Part]:
    """Yield one part for each document of a `key` rule."""
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
    """Return the partial (out like q, lse `[b, h_kv, h / h_kv, s_q]`) of q over the parts' keys.

    Args:
        q: `[b, s_q, h_kv, h / h_kv, d]`, rotated.
        parts: no query of a head may be in two of them.
        before: a partial over other keys, into which this one is merged in place.
        out_dtype: of out, where nothing is merged; default: the wider of fp32 and q.dtype.

    A query that sees no key has out = 0, lse = -inf.
    """
    if impl is TRITON_IMPL:
        return parts_fwd(q, k, v, parts, softmax_scale, before, out_dtype)
    if before is None:
        wide = wide_dtype(q.dtype)
        out = torch.zeros(q.shape, dtype=out_dtype or wide, device=q.device)
        lse = out.new_full((q.shape[0], *q.shape[2:4], q.shape[1]), -torch.inf, dtype=wide)
    else:
        out, lse = before
    for part in parts:
        own = (slice(None), part.keys, part.k_heads)
        partial = impl.fwd(part.queries(q), k[own], v[own], *part.band, softmax_scale)
        if before is not None:
            partial = merge(part.queries(out), part.row_numbers(lse), *partial)
        heads = out[:, part.rows, part.kv, part.members]
        heads.copy_(partial[0].view(heads.shape))
        rows = lse[:, part.kv, part.members, part.rows]
        rows.copy_(partial[1].view(rows.shape))
    return out, lse


def banded_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, row: Partial, parts: Sequence[Part], dq: Tensor,
    softmax_scale: float, *,
    impl: AttentionImpl = TORCH_IMPL,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the share of (dk, dv) that passes through the parts; add that of dq to `dq`.

    Args:
        dout, q: like q in `banded_fwd`. dq: the same, in the wider of fp32 and q.dtype.
        row: (out, lse) over all keys that the queries see.

    Returns:
        dk, dv in the wider of fp32 and q.dtype.
    """
    if impl is TRITON_IMPL:
        return parts_bwd(dout, q, k, v, row, parts, dq, softmax_scale)
    wide = wide_dtype(q.dtype)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    out, lse = row
    for part in parts:
        own = (slice(None), part.keys, part.k_heads)
        shares = impl.bwd(
            part.queries(dout), part.queries(q), k[own], v[own], part.queries(out),
            part.row_numbers(lse), *part.band, softmax_scale,
        )  # fmt: skip
        heads = dq[:, part.rows, part.kv, part.members]
        heads.add_(shares[0].view(heads.shape))
        dk[own].add_(shares[1])
        dv[own].add_(shares[2])
    return dk, dv

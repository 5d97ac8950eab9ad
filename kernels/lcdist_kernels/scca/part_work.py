"""Run all parts of a rank's queries over a tensor of keys in one launch, by a work table.

Under context parallelism the keys of a tensor are the rank's own, received ones or a block of a
ring. A table names keys by their place in the tensor, so kernels need no token numbers. Results of
several tensors are merged where a launch writes them: `before` in the forward, `dq` in the
backward.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full.piece_kernel import launches_for, partial_bwd, partial_fwd
from lcdist_kernels.full.piece_tables import make_tables
from lcdist_kernels.full.pieces import NO_KEYS, Launches, Piece, Work, WorkTables
from lcdist_kernels.plans import cached_plan
from lcdist_kernels.scca.part import Part
from lcdist_kernels.tile_ranges import DeviceStream, device_stream

Partial = tuple[Tensor, Tensor]


class Parts(list[Part]):
    """Parts that a plan holds, compared by identity: the key of the tables made of them."""

    # A list has no hash; this one is never changed after it is made.
    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


class Sizes(NamedTuple):
    """Sizes of q `[b, seqlen_q, nheads_kv, group, d]` and of k `[b, seqlen_k, nheads_k, d]`."""

    seqlen_q: int
    nheads_kv: int
    group: int
    seqlen_k: int
    nheads_k: int


def parts_fwd(
    q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], softmax_scale: float,
    before: Partial | None, out_dtype: torch.dtype | None,
) -> Partial:  # fmt: skip
    """Return what `tiled.banded_fwd` returns, from one launch."""
    if before is None:
        wide = wide_dtype(q.dtype)
        out = torch.empty(q.shape, dtype=out_dtype or wide, device=q.device)
        lse = torch.empty((len(q), *q.shape[2:4], q.shape[1]), dtype=wide, device=q.device)
    else:
        out, lse = before
    if not parts or not q.numel() or not k.shape[1]:
        return (out.zero_(), lse.fill_(-torch.inf)) if before is None else before
    tables = _tables(q, k, v, parts, all_rows=before is None)
    partial_fwd(
        q, k, v, tables, softmax_scale, (out.flatten(2, 3), lse.flatten(1, 2)),
        merge=before is not None,
    )  # fmt: skip
    return out, lse


def parts_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, row: Partial, parts: Sequence[Part], dq: Tensor,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `tiled.banded_bwd` returns, and add to dq, in two launches."""
    wide = wide_dtype(q.dtype)
    if not parts or not q.numel() or not k.shape[1]:
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        return dk, dv
    tables = _tables(q, k, v, parts, all_rows=False)
    dk, dv = (torch.empty(x.shape, dtype=wide, device=x.device) for x in (k, v))
    out, lse = row
    partial_bwd(
        dout.flatten(2, 3), q, k, v, out.flatten(2, 3), lse.flatten(1, 2), tables, softmax_scale,
        (dq.flatten(2, 3), dk, dv),
    )  # fmt: skip
    return dk, dv


def _tables(q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Part], all_rows: bool) -> WorkTables:
    sizes = Sizes(q.shape[1], q.shape[2], q.shape[3], k.shape[1], k.shape[2])
    held = parts if isinstance(parts, Parts) else Parts(parts)
    return part_tables(held, sizes, all_rows, launches_for(q[:, :, 0], k, v), device_stream(q))


@cached_plan
def part_tables(
    parts: Parts,
    sizes: Sizes,
    all_rows: bool,
    launches: tuple[Launches, Launches | None],
    place: DeviceStream,
) -> WorkTables:
    """Return the work tables of parts.

    all_rows: whether rows without keys get a result too. launches: as `launches_for` returns them.
    """
    by_pointers, described = launches
    return make_tables(work_of_parts(parts, sizes, all_rows), by_pointers, place, described)


def work_of_parts(parts: Sequence[Part], sizes: Sizes, all_rows: bool) -> Work:
    """Return what is to be computed: a rule for each set of query heads with the same parts."""
    seqlen, group = sizes.seqlen_q, sizes.group
    by_heads: dict[tuple[int, ...], list[Part]] = {}
    key_heads = [NO_KEYS] * (sizes.nheads_kv * group)
    for part in parts:
        kv, members = range(sizes.nheads_kv)[part.kv], range(group)[part.members]
        for number, held in zip(kv, range(sizes.nheads_k)[part.k_heads], strict=True):
            for member in members:
                key_heads[number * group + member] = held
        heads = tuple(number * group + member for number in kv for member in members)
        by_heads.setdefault(heads, []).append(part)
    # Rule 0 is of heads without parts: they see nothing.
    rules = [0] * len(key_heads)
    pieces = [Piece(0, range(seqlen), range(0))]
    limits = [(torch.zeros(seqlen, dtype=torch.int64), torch.full((seqlen,), -1))]
    for rule, (heads, own) in enumerate(by_heads.items(), 1):
        for head in heads:
            rules[head] = rule
        q_lo, q_hi = (limit.clone() for limit in limits[0])
        for part in own:
            keys = range(sizes.seqlen_k)[part.keys]
            first = torch.searchsorted(part.k_idx.contiguous(), part.q_lo.contiguous())
            last = (
                torch.searchsorted(part.k_idx.contiguous(), part.q_hi.contiguous(), right=True) - 1
            )
            q_lo[part.rows] = keys.start + keys.step * first
            q_hi[part.rows] = keys.start + keys.step * last
            pieces.append(Piece(rule, range(seqlen)[part.rows], keys))
        limits.append((q_lo, q_hi))
        pieces += [Piece(rule, rows, range(0)) for rows in _rows_outside(own, seqlen)]
    q_lo, q_hi = (torch.stack(limit) for limit in zip(*limits, strict=True))
    return Work(
        heads=rules,
        key_heads=key_heads,
        group=group,
        nheads_k=sizes.nheads_k,
        num_keys=sizes.seqlen_k,
        pieces=pieces,
        q_lo=q_lo,
        q_hi=q_hi,
        all_rows=all_rows,
    )


def _rows_outside(parts: Sequence[Part], seqlen: int) -> Iterator[range]:
    """Yield the rows that no part has, as ranges with the parts' step."""
    outside = torch.ones(seqlen, dtype=torch.bool)
    for part in parts:
        outside[part.rows] = False
    step = max(part.rows.step or 1 for part in parts)
    for residue in range(min(step, seqlen)):
        rows = torch.arange(residue, seqlen, step)
        edges = torch.diff(outside[rows].int(), prepend=torch.zeros(1), append=torch.zeros(1))
        begins, ends = ((edges == sign).nonzero().flatten().tolist() for sign in (1, -1))
        for begin, end in zip(begins, ends, strict=True):
            yield range(residue + step * begin, residue + step * end, step)

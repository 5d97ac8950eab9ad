"""Shifted cross chunk attention as one work table: rules turned into pieces (see `full.pieces`)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lcdist_kernels.common import document_starts
from lcdist_kernels.full.piece_kernel import pieces_bwd, pieces_fwd
from lcdist_kernels.full.piece_tables import make_tables
from lcdist_kernels.full.pieces import Launches, Piece, Work, WorkTables
from lcdist_kernels.plans import cached_plan
from lcdist_kernels.scca.rules import Rule
from lcdist_kernels.tape import kept
from lcdist_kernels.tile_ranges import DeviceStream


class PiecesFunction(torch.autograd.Function):
    """Attention of a work table over q `[b, s, h, d]`; saves q, k, v, out and lse.

    plan: the arguments of `scca_tables`.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, plan: tuple[Any, ...], scale: float) -> Tensor:
        out, lse2 = kept(lambda: pieces_fwd(q, k, v, scca_tables(*plan), scale))
        ctx.save_for_backward(q, k, v, out, lse2)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse2 = ctx.saved_tensors
        tables = scca_tables(*ctx.plan)
        return *pieces_bwd(dout, q, k, v, out, lse2, tables, ctx.scale), None, None


@cached_plan
def scca_tables(
    rules: tuple[Rule, ...],
    nheads_kv: int,
    seqlen: int,
    documents: tuple[int, ...] | None,
    launches: tuple[Launches, Launches | None],
    place: DeviceStream,
) -> WorkTables:
    """Return the work tables of a sequence over itself.

    rules: one per query head. documents: document borders; None for one document. launches: as
    `launches_for` returns them.
    """
    borders = None if documents is None else torch.tensor(documents)
    starts = document_starts(borders, torch.arange(seqlen), seqlen)
    by_pointers, described = launches
    return make_tables(work_of(rules, nheads_kv, starts), by_pointers, place, described)


def work_of(rules: Sequence[Rule], nheads_kv: int, starts: Tensor) -> Work:
    """Return what is to be computed. starts: the first token of each token's document."""
    different = list(dict.fromkeys(rules))
    index = torch.arange(len(starts))
    limits = [_limits(rule, index, starts) for rule in different]
    pieces = [
        Piece(number, rows, keys)
        for number, rule in enumerate(different)
        for rows, keys in _pieces(rule, index, starts, *limits[number])
    ]
    q_lo, q_hi = (torch.stack(limit) for limit in zip(*limits, strict=True))
    group = len(rules) // nheads_kv
    return Work(
        heads=[different.index(rule) for rule in rules],
        key_heads=[head // group for head in range(len(rules))],
        group=group,
        nheads_k=nheads_kv,
        num_keys=len(starts),
        pieces=pieces,
        q_lo=q_lo,
        q_hi=q_hi,
    )


def _limits(rule: Rule, index: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and the last key that each token may see, as token numbers."""
    if not rule.is_window:
        return starts, index
    first, last = rule.limits(index - starts)
    return first + starts, last + starts


def _pieces(
    rule: Rule, index: Tensor, starts: Tensor, q_lo: Tensor, q_hi: Tensor
) -> Iterator[tuple[range, range]]:
    """Yield the rows and the keys of each piece of a rule."""
    seqlen, step, shift = len(starts), rule.size, rule.shift
    if rule.is_window:
        for row, stop in rising_runs(q_lo, q_hi):
            yield range(row, stop), range(int(q_lo[row]), max(int(q_hi[stop - 1]) + 1, 0))
    elif rule.kind == "pair":
        # i - j does not depend on where a document begins, so global residues are exact.
        for residue in range(min(step, seqlen)):
            yield range(residue, seqlen, step), range((residue - shift) % step, seqlen, step)
    else:
        begin = (index == starts).nonzero().flatten().tolist()
        for start, stop in zip(begin, [*begin[1:], seqlen], strict=True):
            yield range(start, stop), range(start + shift, stop, step)


def rising_runs(q_lo: Tensor, q_hi: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (first, stop) of runs of queries whose limits do not decrease."""
    falls = (q_lo[1:] < q_lo[:-1]) | (q_hi[1:] < q_hi[:-1])
    inner = (falls.nonzero().flatten() + 1).tolist()
    yield from zip([0, *inner], [*inner, len(q_lo)], strict=True)

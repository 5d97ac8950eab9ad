"""The ring passes of LSSA and LSSAR, by torch and by kernels; the formulas are in `attention`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.config.schema import LssarOptions
from lcdist.exchange import ring, ring_with_gradients
from lcdist_kernels import lssar as ops
from lcdist_kernels.full import reaches, visible
from lcdist_kernels.lssar import Band, LssarImpl, Reweight, Threshold
from lcdist_kernels.lssar.rows import RowResults
from lcdist_kernels.tape import kept, records


def reweight_of(options: LssarOptions) -> Reweight | None:
    """Return LSSAR's re-weighting; None for LSSA."""
    if not options.reweight:
        return None
    return Reweight(power=options.power, exempt_rows=options.exempt_rows)


def band_of(ctx: AttentionContext, owner: int) -> Band:
    """Return which keys of rank `owner` this rank's queries see."""
    return Band(ctx.token_ids(), ctx.starts(), ctx.token_ids(owner))


def token_directions(x: Tensor, owner: int, ctx: AttentionContext) -> Tensor:
    """Normalise and rotate queries or keys of rank `owner`."""
    return ops.directions(x, ctx.rotary, ctx.positions(owner))


def reference_ring(queries: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return attention with dense maths on every block and gradients by autograd.

    `RingLssar` is tested against it.
    """
    reweight = reweight_of(ctx.options)

    def scores(owner: int, k_blk: Tensor) -> Tensor:
        mask = visible(*band_of(ctx, owner)).to(queries.device)
        return ops.softplus_scores(queries, token_directions(k_blk, owner, ctx), mask)

    threshold = ops.no_threshold(queries)
    if reweight is not None:
        blocks = [scores(*visit) for visit in ring(k, ctx.group)]
        total = torch.stack([block.sum(-1) for block in blocks]).sum(0)
        largest = torch.stack([block.amax(-1) for block in blocks]).amax(0)
        shares = ops.mean_shares(band_of(ctx, ctx.rank).counts, reweight, queries)
        threshold = ops.row_threshold(total, largest, shares)
    sums = [
        ops.lssar_block(scores(owner, kv_blk[0]), kv_blk[1], threshold, reweight)
        for owner, kv_blk in ring(torch.stack((k, v)), ctx.group)
    ]
    out, weight = (torch.stack(blocks).sum(0) for blocks in zip(*sums, strict=True))
    return out / ops.divisor(weight)


class RingLssar(torch.autograd.Function):
    """Two ring passes forward (LSSA: one), one backward.

    Saves queries, k, v, out, e and two scalars per row. The input `keys`, the directions of `k`,
    receives the gradient that the ring returns; autograd takes it from there to `k`. For an
    implementation that multiplies wide directions.
    """

    @staticmethod
    def forward(
        node: Any,
        queries: Tensor,
        keys: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: AttentionContext,
        impl: LssarImpl,
    ) -> Tensor:
        kv, to_keys = torch.stack((k, v)), partial(token_directions, ctx=ctx)
        slope = records() or any(node.needs_input_grad)
        results = RowResults(*kept(lambda: _laps(queries, kv, to_keys, ctx, impl, slope)))
        node.save_for_backward(queries, kv, *results)
        node.attention, node.impl = ctx, impl
        return results.out

    @staticmethod
    def backward(node: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        queries, kv, *row = node.saved_tensors
        ctx = node.attention
        to_keys = partial(token_directions, ctx=ctx)
        dqueries, dkeys, dv = _backward_lap(dout, queries, kv, row, to_keys, ctx, node.impl)
        return dqueries, dkeys, None, dv.to(kv.dtype), None, None


class RingKernels(torch.autograd.Function):
    """The same by kernels, of q and k that are not directions yet.

    Saves one fp32 scalar more of each row and key: the factor that makes it a direction.
    """

    @staticmethod
    def forward(
        node: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: AttentionContext,
        tables: ops.DirectionTables,
    ) -> Tensor:
        made = ops.directions_of(q, k, tables)
        kv, impl = torch.stack((made.keys, v)), ops.TRITON_IMPL
        slope = records() or any(node.needs_input_grad)
        results = RowResults(*kept(lambda: _laps(made.queries, kv, _as_sent, ctx, impl, slope)))
        node.save_for_backward(made.queries, kv, made.q_norms, made.k_norms, *results)
        node.attention, node.tables = ctx, tables
        return results.out

    @staticmethod
    def backward(node: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        queries, kv, *norms_and_row = node.saved_tensors
        norms, row = norms_and_row[:2], norms_and_row[2:]
        lap = (queries, kv, row, _as_sent, node.attention, ops.TRITON_IMPL)
        dqueries, dkeys, dv = _backward_lap(dout, *lap)
        made = ops.Directions(queries, kv[0], *norms)
        dq, dk = ops.directions_bwd(dqueries, dkeys, made, node.tables)
        return dq, dk, dv.to(kv.dtype), None, None


# (What travels of keys, its owner) -> directions.
ToKeys = Callable[[Tensor, int], Tensor]


def _as_sent(keys: Tensor, owner: int) -> Tensor:
    """Return keys that travel as directions."""
    return keys


def _laps(
    queries: Tensor,
    kv: Tensor,
    to_keys: ToKeys,
    ctx: AttentionContext,
    impl: LssarImpl,
    with_slope: bool,
) -> RowResults:
    """Return the results of rows over all ranks' keys, out and slope in the dtype of values."""
    reweight, sums = reweight_of(ctx.options), None
    threshold = _mean_pass(queries, kv[0], to_keys, ctx, impl)
    for owner, (k_blk, v_blk) in ring(kv, ctx.group):
        band = band_of(ctx, owner)
        if not reaches(*band):
            continue
        keys_blk = to_keys(k_blk, owner)
        visit = impl.fwd(queries, keys_blk, v_blk, band, threshold, reweight, with_slope)
        sums = visit if sums is None else sums.plus(visit)
    assert sums is not None, "a token sees at least itself"
    return ops.lssar_finish(sums, threshold, reweight).narrowed(kv.dtype)


def _backward_lap(
    dout: Tensor,
    queries: Tensor,
    kv: Tensor,
    row: Sequence[Tensor],
    to_keys: ToKeys,
    ctx: AttentionContext,
    impl: LssarImpl,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, of this rank's directions of keys, and of its values.

    row: the fields of `RowResults`.
    """
    reweight, dqueries = reweight_of(ctx.options), None
    stats = impl.rows(dout, *row, band_of(ctx, ctx.rank), reweight)
    visits = ring_with_gradients(kv, ctx.group)
    for visit in visits:
        band = band_of(ctx, visit.owner)
        if not reaches(*band):
            continue
        k_blk, v_blk = visit.block
        keys_blk = to_keys(k_blk, visit.owner)
        dqueries_blk, dk, dv = impl.bwd(dout, queries, keys_blk, v_blk, band, stats, reweight)
        visit.add_gradient(torch.stack((dk, dv)))
        dqueries = dqueries_blk if dqueries is None else dqueries.add_(dqueries_blk)
    assert dqueries is not None, "a token sees at least itself"
    dkeys, dv = visits.result()
    return dqueries, dkeys, dv


def _mean_pass(
    queries: Tensor, k: Tensor, to_keys: ToKeys, ctx: AttentionContext, impl: LssarImpl
) -> Threshold:
    """Return every row's threshold; LSSA has none, and sends nothing here."""
    none, reweight = ops.no_threshold(queries), reweight_of(ctx.options)
    if reweight is None:
        return none
    total, largest = torch.zeros_like(none.mean), torch.zeros_like(none.mean)
    for owner, k_blk in ring(k, ctx.group):
        band = band_of(ctx, owner)
        if reaches(*band):
            total_blk, largest_blk = impl.sums(queries, to_keys(k_blk, owner), band)
            total, largest = total + total_blk, torch.maximum(largest, largest_blk)
    shares = ops.mean_shares(band_of(ctx, ctx.rank).counts, reweight, queries)
    return ops.row_threshold(total, largest, shares)

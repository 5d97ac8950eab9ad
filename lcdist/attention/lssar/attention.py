"""LSSA and LSSAR under context parallelism: one pass for the mean, one for the sums (2501.13428).

    f_ij = softplus(ln(head_dim) ln(N_i) cos(q_i, k_j)),   where N_i keys are visible to query i
    out_i = sum_j w_ij v_j / sum_j w_ij,   w = f (LSSA)  or  relu(f_ij - mean of f_i)^p (LSSAR)

Every rank keeps its queries. LSSAR's first ring pass moves keys alone and gives every row its mean.
The second, which is LSSA's only one, moves keys and values. Sums over keys are plain additions in
fp32. One more sum per row makes the gradient through the mean known beforehand, so the backward
takes one pass. Keys travel as they are; the receiver normalises and rotates them to directions.
Gradients of directions travel back, and the owner turns them into gradients of keys.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext, DecodeCache
from lcdist.attention.facts import ContextFunctions
from lcdist.attention.interface import AttentionMethod
from lcdist.attention.shape import Shape, Traffic
from lcdist.attention.shared.checks import causal_flops, decode_rows
from lcdist.config.schema import LssarOptions
from lcdist.exchange import ring, ring_with_gradients
from lcdist.layout import KINDS, ContextLayout
from lcdist_kernels import lssar as ops
from lcdist_kernels.full import reaches, visible
from lcdist_kernels.lssar import Band, LssarImpl, Reweight, Threshold
from lcdist_kernels.lssar.rows import RowResults
from lcdist_kernels.tape import kept, records


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return this rank's shard of the output.

    ctx.softmax_scale takes the place of ln(head_dim). Raises ValueError if the power is below 1 in
    half precision.
    """
    queries = _directions(q, ctx, ctx.rank)
    queries = queries * ops.logit_scales(_band(ctx, ctx.rank).counts, ctx.softmax_scale, queries)
    if ctx.impl == "reference":
        return _reference_ring(queries, k, v, ctx).to(q.dtype)
    what = "lssar attention under context parallelism"
    impl = ops.select_lssar_impl(ctx.impl, q, what, _reweight(ctx))
    return _RingLssar.apply(queries, _directions(k, ctx, ctx.rank), k, v, ctx, impl)


def attend_local(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return the output of a whole sequence on one rank."""
    return ops.lssar_attention(q, k, v, reweight=_reweight(ctx), **ctx.kernel_arguments)


def _reweight(ctx: AttentionContext) -> Reweight | None:
    """Return LSSAR's re-weighting; None for LSSA."""
    options: LssarOptions = ctx.options
    if not options.reweight:
        return None
    return Reweight(power=options.power, exempt_rows=options.exempt_rows)


def _band(ctx: AttentionContext, owner: int) -> Band:
    """Return which keys of rank `owner` this rank's queries see."""
    return Band(ctx.token_ids(), ctx.starts(), ctx.token_ids(owner))


def _directions(x: Tensor, ctx: AttentionContext, owner: int) -> Tensor:
    """Normalise and rotate queries or keys of rank `owner`."""
    return ops.directions(x, ctx.rotary, ctx.positions(owner))


def _reference_ring(queries: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return attention with dense maths on every block and gradients by autograd.

    `_RingLssar` is tested against it.
    """
    reweight = _reweight(ctx)

    def scores(owner: int, k_blk: Tensor) -> Tensor:
        mask = visible(*_band(ctx, owner)).to(queries.device)
        return ops.softplus_scores(queries, _directions(k_blk, ctx, owner), mask)

    threshold = ops.no_threshold(queries)
    if reweight is not None:
        blocks = [scores(*visit) for visit in ring(k, ctx.group)]
        total = torch.stack([block.sum(-1) for block in blocks]).sum(0)
        largest = torch.stack([block.amax(-1) for block in blocks]).amax(0)
        shares = ops.mean_shares(_band(ctx, ctx.rank).counts, reweight, queries)
        threshold = ops.row_threshold(total, largest, shares)
    sums = [
        ops.lssar_block(scores(owner, kv_blk[0]), kv_blk[1], threshold, reweight)
        for owner, kv_blk in ring(torch.stack((k, v)), ctx.group)
    ]
    out, weight = (torch.stack(blocks).sum(0) for blocks in zip(*sums, strict=True))
    return out / ops.divisor(weight)


class _RingLssar(torch.autograd.Function):
    """Two ring passes forward (LSSA: one), one backward.

    Saves queries, k, v, out, e and two scalars per row. The input `keys`, the directions of `k`,
    receives the gradient that the ring returns; autograd takes it from there to `k`.
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
        queries, kv = impl.factor(queries, v), torch.stack((k, v))
        with_slope = records() or any(node.needs_input_grad)
        results = RowResults(*kept(lambda: _laps(queries, kv, ctx, impl, with_slope)))
        node.save_for_backward(queries, kv, *results)
        node.attention, node.impl = ctx, impl
        return results.out

    @staticmethod
    def backward(node: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        queries, kv, *row = node.saved_tensors
        ctx, impl, reweight = node.attention, node.impl, _reweight(node.attention)
        rows = impl.rows(dout, *row, _band(ctx, ctx.rank), reweight)
        dqueries = torch.zeros(queries.shape, dtype=rows.mean.dtype, device=queries.device)
        visits = ring_with_gradients(kv, ctx.group)
        for visit in visits:
            band = _band(ctx, visit.owner)
            if not reaches(*band):
                continue
            k_blk, v_blk = visit.block
            keys_blk = impl.factor(_directions(k_blk, ctx, visit.owner), v_blk)
            dqueries_blk, dk, dv = impl.bwd(dout, queries, keys_blk, v_blk, band, rows, reweight)
            visit.add_gradient(torch.stack((dk, dv)))
            dqueries += dqueries_blk
        dkeys, dv = visits.result()
        return dqueries, dkeys, None, dv.to(kv.dtype), None, None


def _laps(
    queries: Tensor, kv: Tensor, ctx: AttentionContext, impl: LssarImpl, with_slope: bool
) -> RowResults:
    """Return the results of rows over all ranks' keys, out and slope in the dtype of values."""
    reweight, sums = _reweight(ctx), None
    threshold = _mean_pass(queries, kv[0], ctx, impl)
    for owner, (k_blk, v_blk) in ring(kv, ctx.group):
        band = _band(ctx, owner)
        if not reaches(*band):
            continue
        keys_blk = impl.factor(_directions(k_blk, ctx, owner), v_blk)
        visit = impl.fwd(queries, keys_blk, v_blk, band, threshold, reweight, with_slope)
        sums = visit if sums is None else sums.plus(visit)
    assert sums is not None, "a token sees at least itself"
    return ops.lssar_finish(sums, threshold, reweight).narrowed(kv.dtype)


def _mean_pass(queries: Tensor, k: Tensor, ctx: AttentionContext, impl: LssarImpl) -> Threshold:
    """Return every row's threshold; LSSA has none, and sends nothing here."""
    none, reweight = ops.no_threshold(queries), _reweight(ctx)
    if reweight is None:
        return none
    total, largest = torch.zeros_like(none.mean), torch.zeros_like(none.mean)
    for owner, k_blk in ring(k, ctx.group):
        band = _band(ctx, owner)
        if reaches(*band):
            keys_blk = impl.factor(_directions(k_blk, ctx, owner), k)
            total_blk, largest_blk = impl.sums(queries, keys_blk, band)
            total, largest = total + total_blk, torch.maximum(largest, largest_blk)
    shares = ops.mean_shares(_band(ctx, ctx.rank).counts, reweight, queries)
    return ops.row_threshold(total, largest, shares)


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return dense attention of a whole sequence: see `lssar_reference`."""
    return ops.lssar_reference(q, k, v, reweight=_reweight(ctx), **ctx.reference_arguments)


def decode(q: Tensor, cache: DecodeCache, ctx: AttentionContext) -> Tensor:
    """Return attention of new tokens over the keys and values up to their positions."""
    decode_row = partial(
        ops.lssar_cached,
        reweight=_reweight(ctx),
        rotary=ctx.rotary,
        softmax_scale=ctx.softmax_scale,
    )
    return decode_rows(q, cache.k, cache.v, cache.positions, decode_row)


def flops(options: LssarOptions, shape: Shape) -> int:
    """Count forward operations of one layer: 4 head_dim per visible pair, 6 with re-weighting.

    Re-weighting computes scores twice. The additional sum for the backward is left out.
    """
    once = causal_flops(shape)
    return once * 3 // 2 if options.reweight else once


def traffic(options: LssarOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends in one layer.

    Forward: cp - 1 hops of k and v; with re-weighting, k once more. Backward: k and v again, and cp
    hops of gradients in the wider of fp32 and their dtype. cp_size = 1 sends nothing.
    """
    cp, keys = layout.cp_size, shape.batch * layout.local_seqlen * shape.nheads_kv * shape.head_dim
    forward = (cp - 1) * (3 if options.reweight else 2) * keys * shape.itemsize
    gradients = cp * max(4, shape.itemsize) if cp > 1 else 0
    backward = 2 * keys * ((cp - 1) * shape.itemsize + gradients)
    return Traffic((forward,) * cp, (backward,) * cp)


def kept_bytes(options: LssarOptions, shape: Shape, layout: ContextLayout) -> int:
    """Count out, two numbers a row and, with re-weighting, e / gamma, which is like out."""
    rows = shape.batch * layout.local_seqlen * shape.nheads
    out = rows * shape.head_dim * shape.itemsize
    return (2 if options.reweight else 1) * out + 2 * rows * max(4, shape.itemsize)


METHOD = AttentionMethod(
    name="lssar",
    paper="2501.13428",
    options=LssarOptions,
    layouts=KINDS,
    exchange=("ring",),
    supports=frozenset({"gqa", "varlen", "decode"}),
    flops=flops,
    bytes=traffic,
    kept_bytes=kept_bytes,
    impls=ops.IMPLS,
    default_scale=math.log,
    functions=ContextFunctions(attend, reference, decode, attend_local),
)

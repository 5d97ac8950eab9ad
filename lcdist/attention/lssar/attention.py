"""LSSA and LSSAR under context parallelism: one lap for the mean, one for the sums (2501.13428).

    f_ij = softplus(ln(head_dim) ln(N_i) cos(q_i, k_j)),   N_i keys being visible to i
    out_i = sum_j w_ij v_j / sum_j w_ij,   w = f (LSSA)  or  relu(f_ij - mean of f_i)^p (LSSAR)

Each rank keeps its queries. LSSAR's first lap moves keys alone and gives each row its mean; the
second, the only one of LSSA, moves keys and values, and every sum over keys is a plain addition in
fp32. One more sum per row makes the gradient through the mean known beforehand, so the backward is
one lap. Keys travel as they are, and are normalised and rotated where they arrive: their gradients
travel as those of rotated directions and are taken back to keys at home.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.interface import AttentionMethod, HeadSlice, Shape, Traffic
from lcdist.attention.shared.checks import (
    causal_flops,
    check_plain,
    check_shard,
    decode_rows,
    tokens,
)
from lcdist.config.schema import LssarOptions
from lcdist.exchange import Group, group_rank, ring, ring_with_gradients
from lcdist.layout import KINDS, ContextLayout, pieces_needed
from lcdist_kernels import Rotary
from lcdist_kernels import lssar as ops
from lcdist_kernels.common import check_impl, check_qkv
from lcdist_kernels.full import reaches, visible
from lcdist_kernels.lssar import TORCH_IMPL, Band, LssarImpl, Reweight, Threshold


@dataclass(frozen=True)
class _Ring:
    """Who is on the ring, whose tokens are whose, and how keys become directions."""

    layout: ContextLayout
    group: Group
    cu_seqlens: Tensor | None
    rotary: Rotary | None
    reweight: Reweight | None
    operator: LssarImpl = TORCH_IMPL

    def band(self, owner: int) -> Band:
        """What this rank's queries see of `owner`'s keys."""
        here = tokens(self.layout, group_rank(self.group), self.cu_seqlens)
        return Band(*here, self.layout.positions(owner))

    def directions(self, x: Tensor, owner: int) -> Tensor:
        """Queries or keys of `owner`, normalised and rotated."""
        index, starts = tokens(self.layout, owner, self.cu_seqlens)
        return ops.directions(x, self.rotary, index - starts)

    def rows(self) -> Band:
        """This rank's queries, against their own keys."""
        return self.band(group_rank(self.group))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: LssarOptions,
    layout: ContextLayout,
    group: Group,
    rotary: Rotary | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
    impl: str = "auto",
) -> Tensor:
    """This rank's shard of the attention of a whole sequence; out is like q.

    q `[b, s_local, h, d]`, k, v `[b, s_local, h_kv, d]`: un-rotated, tokens as `layout` cuts them.
    cu_seqlens: borders of documents in the whole sequence, int32 `[n + 1]`, the same for every row
    and on every rank; positions and row numbers restart per document; tokens after the last border
    form one of their own. softmax_scale: in the place of ln(head_dim). impl: one of `METHOD.impls`.

    Raises ValueError where shapes, layout and group do not fit, `impl` is not built, "triton" does
    not take the tensors, or the power is below 1 in half precision.
    """
    check_impl(impl, "lssar", ops.IMPLS)
    check_qkv(q, k, v)
    check_shard(q, k, layout, group)
    check_plain(q, k, params, heads, "lssar")
    reweight = _reweight(options)
    if layout.cp_size == 1:
        return ops.lssar_attention(
            q,
            k,
            v,
            reweight=reweight,
            rotary=rotary,
            cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
            impl=impl,
        )
    what = "lssar attention under context parallelism"
    operator = TORCH_IMPL if impl == "reference" else ops.select_lssar_impl(impl, q, what, reweight)
    around, rank = _Ring(layout, group, cu_seqlens, rotary, reweight, operator), group_rank(group)
    queries = around.directions(q, rank)
    queries = queries * ops.logit_scales(around.rows().counts, softmax_scale, queries)
    if impl == "reference":
        return _reference_ring(queries, k, v, around).to(q.dtype)
    return _RingLssar.apply(queries, around.directions(k, rank), k, v, around)


def _reweight(options: LssarOptions) -> Reweight | None:
    sharpened = Reweight(power=options.power, exempt_rows=options.exempt_rows)
    return sharpened if options.reweight else None


def _reference_ring(queries: Tensor, k: Tensor, v: Tensor, around: _Ring) -> Tensor:
    """Dense maths on every block, gradients by autograd: what `_RingLssar` must meet."""

    def scores(owner: int, k_blk: Tensor) -> Tensor:
        mask = visible(*around.band(owner)).to(queries.device)
        return ops.softplus_scores(queries, around.directions(k_blk, owner), mask)

    threshold = ops.no_threshold(queries)
    if around.reweight is not None:
        blocks = [scores(*visit) for visit in ring(k, around.group)]
        total = torch.stack([block.sum(-1) for block in blocks]).sum(0)
        top = torch.stack([block.amax(-1) for block in blocks]).amax(0)
        shares = ops.mean_shares(around.rows().counts, around.reweight, queries)
        threshold = ops.row_threshold(total, top, shares)
    parts = [
        ops.lssar_block(scores(owner, kv_blk[0]), kv_blk[1], threshold, around.reweight)
        for owner, kv_blk in ring(torch.stack((k, v)), around.group)
    ]
    out, weight = (torch.stack(blocks).sum(0) for blocks in zip(*parts, strict=True))
    return out / ops.divisor(weight)


class _RingLssar(torch.autograd.Function):
    """Two laps forward (LSSA: one), one backward.

    Kept: queries, k, v, out, e and two scalars a row. `keys`, the directions of `k`, is here to
    take the gradient that comes home; autograd then takes it to `k`.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, k: Tensor, v: Tensor, around: _Ring):
        operator, queries = around.operator, around.operator.factor(queries, v)
        threshold, slope = _first_lap(queries, k, around), any(ctx.needs_input_grad)
        kv, sums = torch.stack((k, v)), None
        for owner, (k_blk, v_blk) in ring(kv, around.group):
            band = around.band(owner)
            if not reaches(*band):
                continue
            keys_blk = operator.factor(around.directions(k_blk, owner), v_blk)
            part = operator.fwd(queries, keys_blk, v_blk, band, threshold, around.reweight, slope)
            sums = part if sums is None else sums.plus(part)
        assert sums is not None, "a token sees at least itself"
        done = ops.lssar_finish(sums, threshold, around.reweight)
        out, e = done.out.to(v.dtype), None if done.slope is None else done.slope.to(v.dtype)
        ctx.save_for_backward(queries, kv, out, e, threshold.mean, done.gamma)
        ctx.around = around
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        queries, kv, *row = ctx.saved_tensors
        around, operator = ctx.around, ctx.around.operator
        saved = operator.rows(dout, *row, around.rows(), around.reweight)
        dqueries = torch.zeros(queries.shape, dtype=saved.mean.dtype, device=queries.device)
        lap = ring_with_gradients(kv, around.group)
        for visit in lap:
            band = around.band(visit.owner)
            if not reaches(*band):
                continue
            k_blk, v_blk = visit.block
            keys_blk = operator.factor(around.directions(k_blk, visit.owner), v_blk)
            dqueries_blk, dk, dv = operator.bwd(
                dout, queries, keys_blk, v_blk, band, saved, around.reweight
            )
            visit.add_gradient(torch.stack((dk, dv)))
            dqueries += dqueries_blk
        dkeys, dv = lap.result()
        return dqueries, dkeys, None, dv.to(kv.dtype), None


def _first_lap(queries: Tensor, k: Tensor, around: _Ring) -> Threshold:
    """Every row's threshold; LSSA has none, and sends nothing here."""
    none = ops.no_threshold(queries)
    if around.reweight is None:
        return none
    total, top = torch.zeros_like(none.mean), torch.zeros_like(none.mean)
    for owner, k_blk in ring(k, around.group):
        band = around.band(owner)
        if reaches(*band):
            keys_blk = around.operator.factor(around.directions(k_blk, owner), k)
            total_blk, top_blk = around.operator.sums(queries, keys_blk, band)
            total, top = total + total_blk, torch.maximum(top, top_blk)
    shares = ops.mean_shares(around.rows().counts, around.reweight, queries)
    return ops.row_threshold(total, top, shares)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: LssarOptions,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """The same on the whole sequence, dense, in one process: see `lssar_reference`."""
    check_plain(q, k, params, heads, "lssar")
    return ops.lssar_reference(
        q,
        k,
        v,
        reweight=_reweight(options),
        rotary=rotary,
        positions=positions,
        cu_seqlens=cu_seqlens,
        softmax_scale=softmax_scale,
    )


@torch.no_grad()
def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    options: LssarOptions,
    positions: Tensor,
    rotary: Rotary | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """Attention of new tokens over a cache that holds their own keys and values already.

    q `[b, n, h, d]`, un-rotated, at `positions`: integers on the CPU, `[n]` or, where rows differ
    in length, `[b, n]`. k_cache, v_cache `[b, s_cache, h_kv, d]`, un-rotated: entry j belongs to
    position j; entries after the greatest position are not read. No gradients; out is like q.
    Raises ValueError where shapes do not fit or a position lies outside the cache.
    """
    check_plain(q, k_cache, params, heads, "lssar")
    asked = {"reweight": _reweight(options), "rotary": rotary, "softmax_scale": softmax_scale}
    return decode_rows(q, k_cache, v_cache, positions, partial(ops.lssar_cached, **asked))


def flops(options: LssarOptions, shape: Shape) -> int:
    """Forward operations of one layer: 4 head_dim for each visible pair, 6 with re-weighting.

    Re-weighting makes the scores twice; what training adds up for its backward is left out.
    """
    once = causal_flops(shape)
    return once * 3 // 2 if options.reweight else once


def traffic(options: LssarOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends in one layer.

    Forward cp - 1 hops of k and v, with re-weighting of k once more; backward the former again, and
    cp hops of gradients in the wider of fp32 and their dtype. cp_size = 1 sends nothing.
    """
    cp, keys = layout.cp_size, shape.batch * layout.local_seqlen * shape.nheads_kv * shape.head_dim
    forward = (cp - 1) * (3 if options.reweight else 2) * keys * shape.itemsize
    home = cp * max(4, shape.itemsize) if cp > 1 else 0
    backward = 2 * keys * ((cp - 1) * shape.itemsize + home)
    return Traffic((forward,) * cp, (backward,) * cp)


def multiple_of(options: LssarOptions, cp_size: int, kind: str = "contiguous") -> int:
    """What the layout itself needs: LSSA and LSSAR ask for nothing more."""
    return pieces_needed(kind, cp_size)


METHOD = AttentionMethod(
    name="lssar",
    paper="2501.13428",
    options=LssarOptions,
    layouts=KINDS,
    exchange=("ring",),
    supports=frozenset({"gqa", "varlen", "decode"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    impls=ops.IMPLS,
    reference=reference,
    attention=attention,
    decode=decode,
)

"""Attention over a token and the `reach` tokens before it: a complete method in one file."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lcdist.attention import AttentionContext, AttentionMethod, DecodeCache, Shape, Traffic
from lcdist.attention.shared.checks import decode_rows
from lcdist.exchange import ring
from lcdist.layout import KINDS, ContextLayout
from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full import full_partial, merge, visible


@dataclass(frozen=True, kw_only=True)
class NeighbourOptions:
    """reach: how many earlier tokens a query sees."""

    reach: int = field(default=6, metadata={"min": 0})


def partial(q: Tensor, kv: Tensor, ids: tuple[Tensor, ...], ctx: AttentionContext):
    """Return (out, lse) of rotated q over one block of keys and values."""
    q_ids, starts, k_ids = ids
    mask = visible(q_ids, torch.maximum(starts, q_ids - ctx.options.reach), k_ids)
    return full_partial(q, kv[0], kv[1], mask.to(q.device), ctx.softmax_scale)


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    # Several ranks add to one gradient: what travels, and the sums, are fp32 at least.
    wide, result = wide_dtype(q.dtype), None
    rotated, block = ctx.rotate(q).to(wide), torch.stack((ctx.rotate(k), v)).to(wide)
    for owner, kv in ring(block, ctx.group):
        visit = partial(rotated, kv, (ctx.token_ids(), ctx.starts(), ctx.token_ids(owner)), ctx)
        result = visit if result is None else merge(*result, *visit)
    assert result is not None
    return result[0].to(q.dtype)


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    kv, ids = torch.stack((ctx.rotate(k), v)), ctx.token_ids()
    return partial(ctx.rotate(q), kv, (ids, ctx.starts(), ids), ctx)[0].to(q.dtype)


def decode(q: Tensor, cache: DecodeCache, ctx: AttentionContext) -> Tensor:
    def decode_row(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        k_ids = torch.arange(k.shape[1])
        kv, ids = torch.stack((ctx.rotate_to(k, k_ids), v)), (positions, positions * 0, k_ids)
        return partial(ctx.rotate_to(q, positions), kv, ids, ctx)[0].to(q.dtype)

    return decode_rows(q, cache.k, cache.v, cache.positions, decode_row)


def flops(options: NeighbourOptions, shape: Shape) -> int:
    assert shape.seqlen is not None
    pairs = sum(min(earlier, options.reach) + 1 for earlier in range(shape.seqlen))
    return 4 * shape.batch * shape.nheads * shape.head_dim * pairs


def traffic(options: NeighbourOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    block = 2 * shape.batch * layout.local_seqlen * shape.nheads_kv * shape.head_dim
    sent = (layout.cp_size - 1) * block * max(4, shape.itemsize)
    return Traffic((sent,) * layout.cp_size, (sent,) * layout.cp_size)


METHOD = AttentionMethod(
    name="neighbours",
    paper="2004.05150",
    options=NeighbourOptions,
    layouts=KINDS,
    exchange=("ring",),
    supports=frozenset({"gqa", "varlen", "decode"}),
    flops=flops,
    bytes=traffic,
    attend=attend,
    reference=reference,
    decode=decode,
)

"""Full causal attention under context parallelism: a ring of keys and values (arXiv:2310.01889).

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j   over lo_i <= j <= i,

lo_i being the first token of i's document. Each rank keeps its queries; every block of keys and
values visits it once. A visit gives a partial (out, lse) over the visible part of that block,
partials are merged in fp32, and the last merge is the answer. What is visible follows from global
positions alone, so a zigzag or striped cut is balanced without a line of its own.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.method import AttentionMethod, HeadSlice, Shape, Traffic
from lcdist.config.schema import FullOptions
from lcdist.exchange import Group, group_rank, group_size, ring, ring_home
from lcdist.layout import KINDS, ContextLayout, pieces_needed
from lcdist_kernels import Rotary, full_attention, full_reference
from lcdist_kernels.common import announce, check_impl, check_qkv, document_starts
from lcdist_kernels.full import BUILT, full_bwd, full_fwd, full_partial, merge, reaches, visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: FullOptions,
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
    and on every rank; positions restart per document; tokens after the last border form one of
    their own. impl: "auto", "torch" or "reference".

    Raises ValueError where shapes, layout and group do not fit, or `impl` is not built.
    """
    check_impl(impl, "full", BUILT)
    check_qkv(q, k, v)
    _check_shard(q, k, layout, group)
    _check_params(params)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if layout.cp_size == 1:
        return full_attention(
            q, k, v, rotary=rotary, cu_seqlens=cu_seqlens, softmax_scale=scale, impl=impl
        )
    if rotary is not None:
        index, starts = _tokens(layout, group_rank(group), cu_seqlens)
        q, k = rotary.rotate(q, index - starts), rotary.rotate(k, index - starts)
    if impl == "reference":
        return _reference_ring(q, k, v, layout, group, cu_seqlens, scale)
    if impl == "auto":
        announce("full attention under context parallelism: tiled torch, as no kernel is built yet")
    return _RingAttention.apply(q, k, v, layout, group, cu_seqlens, scale)


def _tokens(layout: ContextLayout, rank: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The global numbers of `rank`'s tokens, and the first token of each one's document."""
    index = layout.positions(rank)
    return index, document_starts(cu_seqlens, index, layout.seqlen)


def _check_shard(q: Tensor, k: Tensor, layout: ContextLayout, group: Group) -> None:
    if group_size(group) != layout.cp_size:
        raise ValueError(
            f"the layout is for cp_size = {layout.cp_size}, the group has {group_size(group)} ranks"
        )
    if not q.shape[1] == k.shape[1] == layout.local_seqlen:
        raise ValueError(
            f"q has {q.shape[1]} tokens and k, v have {k.shape[1]}: this layout gives every rank "
            f"{layout.local_seqlen} of {layout.seqlen}"
        )


def _check_params(params: Mapping[str, Tensor] | None) -> None:
    if params:
        raise ValueError(f"params = {sorted(params)}: full attention has no learnable extras")


def _reference_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ContextLayout,
    group: Group,
    cu_seqlens: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """Dense maths on every block, gradients by autograd: what `_RingAttention` must meet."""
    index, starts = _tokens(layout, group_rank(group), cu_seqlens)
    parts = []
    for owner, kv_blk in ring(torch.stack((k, v)), group):
        mask = visible(index, starts, layout.positions(owner)).to(q.device)
        parts.append(full_partial(q, kv_blk[0], kv_blk[1], mask, softmax_scale))
    out, lse = parts[0]
    for out_blk, lse_blk in parts[1:]:
        out, lse = merge(out, lse, out_blk, lse_blk)
    return out.to(q.dtype)


class _RingAttention(torch.autograd.Function):
    """One lap forward, one lap backward; q, k, v, out and lse are all that is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: ContextLayout,
        group: Group,
        cu_seqlens: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        index, starts = _tokens(layout, group_rank(group), cu_seqlens)
        kv = torch.stack((k, v))
        partial = None
        for owner, kv_blk in ring(kv, group):
            k_idx = layout.positions(owner)
            if not reaches(index, starts, k_idx):
                continue
            blk = full_fwd(q, kv_blk[0], kv_blk[1], index, starts, k_idx, softmax_scale)
            partial = blk if partial is None else merge(*partial, *blk)
        assert partial is not None, "a token sees at least itself"
        out, lse = partial[0].to(q.dtype), partial[1]
        ctx.save_for_backward(q, kv, out, lse)
        ctx.layout, ctx.group, ctx.softmax_scale = layout, group, softmax_scale
        ctx.index, ctx.starts = index, starts
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, kv, out, lse = ctx.saved_tensors
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        lap = ring_home(kv, ctx.group)
        for visit in lap:
            k_idx = ctx.layout.positions(visit.owner)
            if not reaches(ctx.index, ctx.starts, k_idx):
                continue
            k_blk, v_blk = visit.block
            band = (ctx.index, ctx.starts, k_idx)
            dq_blk, dk, dv = full_bwd(
                dout, q, k_blk, v_blk, out, lse, *band, softmax_scale=ctx.softmax_scale
            )
            visit.add(torch.stack((dk, dv)))
            dq += dq_blk
        dk, dv = lap.home().to(kv.dtype)
        return dq.to(q.dtype), dk, dv, None, None, None, None


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: FullOptions,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """The same on the whole sequence, dense, in one process: see `full_reference`."""
    _check_params(params)
    return full_reference(
        q,
        k,
        v,
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
    options: FullOptions,
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
    check_qkv(q, k_cache, v_cache)
    _check_params(params)
    if positions.shape not in (q.shape[1:2], q.shape[:2]):
        raise ValueError(
            f"positions of shape {tuple(positions.shape)}: expected [{q.shape[1]}] or "
            f"{list(q.shape[:2])}"
        )
    if positions.min() < 0 or positions.max() >= k_cache.shape[1]:
        raise ValueError(
            f"positions from {int(positions.min())} to {int(positions.max())}: "
            f"the cache has entries 0 to {k_cache.shape[1] - 1}"
        )
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if positions.dim() == 1:
        return _decode(q, k_cache, v_cache, positions, rotary, scale)
    rows = zip(q.split(1), k_cache.split(1), v_cache.split(1), positions, strict=True)
    return torch.cat([_decode(*row, rotary, scale) for row in rows])


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    rotary: Rotary | None,
    softmax_scale: float,
) -> Tensor:
    filled = int(positions.max()) + 1
    k, v, index = k[:, :filled], v[:, :filled], torch.arange(filled)
    if rotary is not None:
        q, k = rotary.rotate(q, positions), rotary.rotate(k, index)
    starts = torch.zeros_like(positions)
    return full_fwd(q, k, v, positions, starts, index, softmax_scale)[0].to(q.dtype)


def flops(options: FullOptions, shape: Shape) -> int:
    """Forward operations of one layer: 4 head_dim for each of the s (s + 1) / 2 visible pairs."""
    if shape.seqlen is None:
        raise ValueError(f"{shape}: seqlen is needed to count operations")
    pairs = shape.seqlen * (shape.seqlen + 1) // 2
    return 4 * shape.batch * shape.nheads * shape.head_dim * pairs


def traffic(options: FullOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends in one layer.

    Forward cp - 1 hops of k and v; backward the same again, and cp hops of their gradients, which
    travel in the wider of fp32 and the dtype of k and v. cp_size = 1 sends nothing.
    """
    cp = layout.cp_size
    if cp == 1:
        return Traffic((0,), (0,))
    elements = 2 * shape.batch * layout.local_seqlen * shape.nheads_kv * shape.head_dim
    forward = (cp - 1) * elements * shape.itemsize
    backward = forward + cp * elements * max(4, shape.itemsize)
    return Traffic((forward,) * cp, (backward,) * cp)


def layouts_for(options: FullOptions) -> tuple[str, ...]:
    """All of them, whatever the options."""
    return KINDS


def multiple_of(options: FullOptions, cp_size: int, kind: str = "contiguous") -> int:
    """What the layout itself needs: full attention asks for nothing more."""
    return pieces_needed(kind, cp_size)


def parameters(options: FullOptions, nheads: int) -> dict[str, tuple[int, ...]]:
    """None: full attention learns nothing of its own."""
    return {}


METHOD = AttentionMethod(
    name="full",
    paper="1706.03762",
    options=FullOptions,
    layouts=KINDS,
    exchange=("ring",),
    supports=frozenset({"gqa", "varlen", "decode"}),
    layouts_for=layouts_for,
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    parameters=parameters,
    reference=reference,
    attention=attention,
    decode=decode,
)

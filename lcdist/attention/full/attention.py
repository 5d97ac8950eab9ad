"""Full causal attention under context parallelism: a ring of keys and values (arXiv:2310.01889).

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j   over lo_i <= j <= i,

lo_i being the first token of i's document. Rotated keys and values travel together, k above v.
"""

from collections.abc import Mapping

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
from lcdist.attention.shared.ring_softmax import Lap, RingSoftmax, reference_ring, ring_bytes
from lcdist.config.schema import FullOptions
from lcdist.exchange import Group, group_rank
from lcdist.layout import KINDS, ContextLayout, pieces_needed
from lcdist_kernels import Rotary, full_attention, full_reference
from lcdist_kernels.common import check_impl, check_qkv
from lcdist_kernels.full import IMPLS, TORCH_IMPL, full_fwd, select_impl


class FullRingKernel:
    """The factors of plain attention: q as it is, and a block that is keys above values."""

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        return q

    def queries_bwd(self, dqueries: Tensor, q: Tensor, positions: Tensor) -> Tensor:
        return dqueries

    def keys(self, block: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return block[0], block[1]

    def keys_bwd(self, dkeys: Tensor, dvalues: Tensor, positions: Tensor) -> Tensor:
        return torch.stack((dkeys, dvalues))


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
    their own. impl: "auto", "triton", "torch" or "reference".

    Raises ValueError where shapes, layout and group do not fit, `impl` is not built, or "triton"
    does not take the tensors.
    """
    check_impl(impl, "full", IMPLS)
    check_qkv(q, k, v)
    check_shard(q, k, layout, group)
    check_plain(q, k, params, heads, "full")
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if layout.cp_size == 1:
        return full_attention(
            q, k, v, rotary=rotary, cu_seqlens=cu_seqlens, softmax_scale=scale, impl=impl
        )
    what = "full attention under context parallelism"
    operator = TORCH_IMPL if impl == "reference" else select_impl(impl, q, what)
    lap = Lap(layout, group, cu_seqlens, scale, operator)
    if rotary is not None:
        index, starts = tokens(layout, group_rank(group), cu_seqlens)
        q, k = rotary.rotate(q, index - starts), rotary.rotate(k, index - starts)
    kv = torch.stack((k, v))
    if impl == "reference":
        return reference_ring(q, kv, FullRingKernel().keys, lap).to(q.dtype)
    return RingSoftmax.apply(q, kv, FullRingKernel(), lap)


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
    check_plain(q, k, params, heads, "full")
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
    check_plain(q, k_cache, params, heads, "full")
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale

    def one(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        index = torch.arange(k.shape[1])
        if rotary is not None:
            q, k = rotary.rotate(q, positions), rotary.rotate(k, index)
        starts = torch.zeros_like(positions)
        return full_fwd(q, k, v, positions, starts, index, scale)[0].to(q.dtype)

    return decode_rows(q, k_cache, v_cache, positions, one)


def flops(options: FullOptions, shape: Shape) -> int:
    """Forward operations of one layer: 4 head_dim for each of the s (s + 1) / 2 visible pairs."""
    return causal_flops(shape)


def traffic(options: FullOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends in one layer: a lap of k and v, another, and their gradients' way."""
    return ring_bytes(shape, layout, 2 * shape.head_dim)


def multiple_of(options: FullOptions, cp_size: int, kind: str = "contiguous") -> int:
    """What the layout itself needs: full attention asks for nothing more."""
    return pieces_needed(kind, cp_size)


METHOD = AttentionMethod(
    name="full",
    paper="1706.03762",
    options=FullOptions,
    layouts=KINDS,
    exchange=("ring",),
    supports=frozenset({"gqa", "varlen", "decode", "dense"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    impls=IMPLS,
    reference=reference,
    attention=attention,
    decode=decode,
)

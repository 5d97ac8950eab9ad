"""Landmark attention under context parallelism: whole blocks on a ring, or only those chosen.

The last token of every block is its landmark. A query attends to its own block but for the
landmark, and to every past block through one gate each, the landmark's logit, which shares out what
it gets by a softmax inside the block (arXiv:2305.16300; `lcdist_kernels.landmark.reference` has the
formulas). So a past block is one entry of the gate's softmax, and partials over whole blocks merge
as any others: a ring of keys and values, whose every piece is whole blocks. With top_k each unit of
select_tokens tokens reads the past blocks whose landmarks it likes best, and only these travel
(`landmark_fetch`): with a larger unit than one token a later query has a say in which past blocks
the unit's earlier ones read, never in what these blocks hold; outputs of whole units depend on no
later token.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lcdist.attention.interface import AttentionMethod
from lcdist.attention.landmark.gather import Fetch
from lcdist.attention.landmark.plan import (
    LAYOUTS,
    check,
    check_documents,
    check_heads,
    check_layout,
    flops,
    layouts_for,
    multiple_of,
    traffic,
)
from lcdist.attention.landmark.ring import Ring, reference_ring, ring_by_hand
from lcdist.attention.shape import HeadSlice
from lcdist.attention.shared.checks import check_shard, decode_rows, tokens
from lcdist.config.schema import LandmarkOptions
from lcdist.exchange import Group, group_rank
from lcdist.layout import ContextLayout
from lcdist_kernels import Rotary, landmark_attention, landmark_reference
from lcdist_kernels.common import check_impl, check_qkv
from lcdist_kernels.landmark import IMPLS, TORCH_IMPL, landmark_cached, select_landmark_impl


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: LandmarkOptions,
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

    q `[b, s_local, h, d]`, k, v `[b, s_local, h_kv, d]`: un-rotated, tokens as `layout` cuts them,
    a landmark last in every block of block_size. cu_seqlens: borders of documents in the whole
    sequence, int32 `[n + 1]`, the same for every row and on every rank, each a multiple of
    block_size or the end; positions and blocks restart per document; tokens after the last border
    form one of their own. Selection units are counted from the beginning of the whole sequence and
    cut at borders: documents that begin at multiples of select_tokens get what they would alone.
    impl: "auto", "triton", "torch" or "reference".

    Raises ValueError where shapes, layout, group, documents and options do not fit, `impl` is not
    built, or "triton" does not take the tensors.
    """
    check_impl(impl, "landmark", IMPLS)
    check_qkv(q, k, v)
    check_shard(q, k, layout, group)
    check_heads(q, k, params, heads, options)
    check_layout(options, layout)
    check_documents(options, cu_seqlens, layout.seqlen)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if layout.cp_size == 1:
        return landmark_attention(
            q,
            k,
            v,
            block_size=options.block_size,
            top_k=options.top_k,
            select_tokens=options.select_tokens,
            rotary=rotary,
            cu_seqlens=cu_seqlens,
            softmax_scale=scale,
            impl=impl,
        )
    what = "landmark attention under context parallelism"
    operator = TORCH_IMPL if impl == "reference" else select_landmark_impl(impl, q, what)
    if rotary is not None:
        index, starts = tokens(layout, group_rank(group), cu_seqlens)
        q, k = rotary.rotate(q, index - starts), rotary.rotate(k, index - starts)
    if options.top_k is None:
        around = Ring(layout, group, cu_seqlens, scale, options.block_size, operator)
        return (reference_ring if impl == "reference" else ring_by_hand)(q, k, v, around)
    fetch = Fetch(layout, group, cu_seqlens, scale, options, operator)
    return fetch.dense(q, k, v) if impl == "reference" else fetch.by_hand(q, k, v)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: LandmarkOptions,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """The same on the whole sequence, dense, in one process, with documents of any length.

    See `landmark_reference`.
    """
    check_heads(q, k, params, heads, options)
    return landmark_reference(
        q,
        k,
        v,
        block_size=options.block_size,
        top_k=options.top_k,
        select_tokens=options.select_tokens,
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
    options: LandmarkOptions,
    positions: Tensor,
    rotary: Rotary | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """Attention of new tokens over a cache that holds their own keys and values already.

    q `[b, n, h, d]`, un-rotated, at `positions`: integers on the CPU, `[n]` or, where rows differ
    in length, `[b, n]`. k_cache, v_cache `[b, s_cache, h_kv, d]`, un-rotated: entry j belongs to
    position j, landmarks among them; entries after the greatest position are not read. With top_k
    every new token chooses for itself, as with select_tokens = 1: a decoded row is the training row
    there and without top_k; a larger unit is known only once it is over. No gradients; out is like
    q. Raises ValueError where shapes do not fit or a position lies outside the cache.
    """
    check_heads(q, k_cache, params, heads, options)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale

    def one(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return landmark_cached(
            q,
            k,
            v,
            positions,
            block_size=options.block_size,
            top_k=options.top_k,
            rotary=rotary,
            softmax_scale=scale,
        )

    return decode_rows(q, k_cache, v_cache, positions, one)


def exchange_for(options: LandmarkOptions) -> tuple[str, ...]:
    """A ring for the dense form, the gather of blocks with top_k."""
    return ("ring",) if options.top_k is None else ("gather",)


METHOD = AttentionMethod(
    name="landmark",
    paper="2305.16300",
    options=LandmarkOptions,
    layouts=LAYOUTS,
    exchange=("ring", "gather"),
    supports=frozenset({"gqa", "varlen", "decode", "landmarks"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    reference=reference,
    attention=attention,
    decode=decode,
    layouts_for=layouts_for,
    exchange_for=exchange_for,
    check=check,
    impls=IMPLS,
)

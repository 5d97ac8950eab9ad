"""CoCA under context parallelism: a ring of collinear coefficients and values (arXiv:2309.08646).

A score is q'.k' times softmax_scale, causal inside documents (`lcdist_kernels.coca` has both
variants), and k' of a token follows from its position and from

    tau = relu((first half of t + second half of t) / 2)          [head_dim / 2],

so tau travels in the place of the key: 1.5 head_dim for tau and v where keys and values take 2, and
the receiver makes k' from the sender's positions. Gradients come home in the space of tau, and meet
the relu there. `k` and the cache hold t, the output of the projection in the key's place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.interface import AttentionMethod, HeadSlice, Shape, Traffic
from lcdist.attention.shared.checks import (
    causal_flops,
    check_plain,
    check_shard,
    decode_rows,
)
from lcdist.attention.shared.ring_softmax import Lap, RingSoftmax, reference_ring, ring_bytes
from lcdist.config.schema import CocaOptions
from lcdist.exchange import Group
from lcdist.layout import KINDS, ContextLayout, pieces_needed
from lcdist_kernels import Rotary, coca_attention, coca_reference
from lcdist_kernels.coca import (
    IMPLS,
    TORCH_IMPL,
    CoCAImpl,
    angles,
    check_variant,
    coca_keys,
    coca_queries,
    coca_tau,
    collinear,
    collinear_bwd,
    keys,
    queries,
    select_coca_impl,
)
from lcdist_kernels.common import check_impl, check_qkv
from lcdist_kernels.full import full_fwd


class CocaRingKernel:
    """The factors of CoCA: q', and a block `[b, s, h_kv, 3 d / 2]` that is tau and the value."""

    def __init__(
        self, variant: str, rotary: Rotary | None, operator: CoCAImpl = TORCH_IMPL
    ) -> None:
        self.variant, self.rotary, self.operator = variant, rotary, operator

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        at = angles(self.rotary, positions, q, q.shape[3])
        return self.operator.queries(q, at, self.variant)

    def queries_bwd(self, dqueries: Tensor, q: Tensor, positions: Tensor) -> Tensor:
        at = angles(self.rotary, positions, q, q.shape[3])
        return self.operator.queries_bwd(dqueries, q, at, self.variant)

    def keys(self, block: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        tau, v = _apart(block)
        at = angles(self.rotary, positions, v, v.shape[3])
        return self.operator.keys(tau, at, self.variant), v

    def keys_bwd(self, dkeys: Tensor, dvalues: Tensor, positions: Tensor) -> Tensor:
        at = angles(self.rotary, positions, dkeys, dkeys.shape[3])
        return torch.cat((self.operator.keys_bwd(dkeys, at, self.variant), dvalues), -1)

    def dense_keys(self, block: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """As `keys`, by the reference's own lines, which autograd sees through."""
        tau, v = _apart(block)
        return coca_keys(tau, self.rotary, positions, self.variant), v


def _apart(block: Tensor) -> tuple[Tensor, Tensor]:
    half = block.shape[3] // 3
    return block[..., :half], block[..., half:]


class _Pack(torch.autograd.Function):
    """(t, v) -> the block of tau and v; what is kept is the block, which the ring keeps anyway."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, v: Tensor) -> Tensor:
        block = torch.cat((collinear(t), v), -1)
        ctx.save_for_backward(block)
        return block

    @staticmethod
    def backward(ctx: Any, dblock: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (block,) = ctx.saved_tensors
        dtau, dv = _apart(dblock)
        return collinear_bwd(dtau, _apart(block)[0]), dv


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: CocaOptions,
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

    q `[b, s_local, h, d]`, k, v `[b, s_local, h_kv, d]`: un-rotated, tokens as `layout` cuts them;
    k: t, before averaging and relu. cu_seqlens: borders of documents in the whole sequence, int32
    `[n + 1]`, the same for every row and on every rank; positions restart per document; tokens
    after the last border form one of their own. impl: "auto", "triton", "torch" or
    "reference".

    Raises ValueError where shapes, layout and group do not fit, head_dim is odd, the rotary does
    not turn all of it, `impl` is not built, or "triton" does not take the tensors.
    """
    check_impl(impl, "coca", IMPLS)
    check_qkv(q, k, v)
    check_variant(options.variant, q.shape[3])
    check_shard(q, k, layout, group)
    check_plain(q, k, params, heads, "coca")
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if layout.cp_size == 1:
        return coca_attention(
            q,
            k,
            v,
            variant=options.variant,
            rotary=rotary,
            cu_seqlens=cu_seqlens,
            softmax_scale=scale,
            impl=impl,
        )
    if impl == "reference":
        lap = Lap(layout, group, cu_seqlens, scale)
        factors = CocaRingKernel(options.variant, rotary)
        index, starts = lap.here()
        queries_ = coca_queries(q, rotary, index - starts, options.variant)
        block = torch.cat((coca_tau(k), v), -1)
        return reference_ring(queries_, block, factors.dense_keys, lap).to(q.dtype)
    operator = select_coca_impl(impl, q, "coca attention under context parallelism")
    lap = Lap(layout, group, cu_seqlens, scale, operator.block)
    factors = CocaRingKernel(options.variant, rotary, operator)
    return RingSoftmax.apply(q, _Pack.apply(k, v), factors, lap)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: CocaOptions,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """The same on the whole sequence, dense, in one process: see `coca_reference`."""
    check_plain(q, k, params, heads, "coca")
    return coca_reference(
        q,
        k,
        v,
        variant=options.variant,
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
    options: CocaOptions,
    positions: Tensor,
    rotary: Rotary | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """Attention of new tokens over a cache that holds their own t and values already.

    q `[b, n, h, d]`, un-rotated, at `positions`: integers on the CPU, `[n]` or, where rows differ
    in length, `[b, n]`. k_cache (t, before averaging and relu), v_cache `[b, s_cache, h_kv, d]`:
    entry j belongs to position j; entries after the greatest position are not read. No gradients;
    out is like q. Raises ValueError where shapes do not fit or a position lies outside the cache.
    """
    check_plain(q, k_cache, params, heads, "coca")
    check_variant(options.variant, q.shape[3])
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale

    def one(q: Tensor, t: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        index, starts = torch.arange(t.shape[1]), torch.zeros_like(positions)
        queries_ = queries(q, angles(rotary, positions, q, q.shape[3]), options.variant)
        keys_ = keys(collinear(t), angles(rotary, index, t, t.shape[3]), options.variant)
        return full_fwd(queries_, keys_, v, positions, starts, index, scale)[0].to(q.dtype)

    return decode_rows(q, k_cache, v_cache, positions, one)


def flops(options: CocaOptions, shape: Shape) -> int:
    """Forward operations of one layer: those of full attention, as a score is one product q'.k'."""
    return causal_flops(shape)


def traffic(options: CocaOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends in one layer: 3/4 of full attention's, as tau is half a key."""
    return ring_bytes(shape, layout, shape.head_dim // 2 + shape.head_dim)


def multiple_of(options: CocaOptions, cp_size: int, kind: str = "contiguous") -> int:
    """What the layout itself needs: CoCA asks for nothing more."""
    return pieces_needed(kind, cp_size)


METHOD = AttentionMethod(
    name="coca",
    paper="2309.08646",
    options=CocaOptions,
    layouts=KINDS,
    exchange=("ring",),
    supports=frozenset({"gqa", "varlen", "decode"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    impls=IMPLS,
    reference=reference,
    attention=attention,
    decode=decode,
)

"""Full causal attention under context parallelism: a ring of keys and values (arXiv:2310.01889).

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j   over lo_i <= j <= i,

where lo_i is the first token of i's document. Rotated keys and values travel in one tensor. With
`length_scale` queries are multiplied by a factor of the tokens that they see (`length.py`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.attention.facts import ContextFunctions
from lcdist.attention.full.cache import FullCache
from lcdist.attention.full.length import scaled_queries
from lcdist.attention.interface import AttentionMethod
from lcdist.attention.shape import Shape, Traffic
from lcdist.attention.shared.checks import causal_flops
from lcdist.attention.shared.ring_softmax import RingSoftmax, reference_ring, ring_bytes
from lcdist.config.schema import FullOptions
from lcdist.layout import KINDS, ContextLayout
from lcdist_kernels import full_attention, full_reference
from lcdist_kernels.full import IMPLS, TORCH_IMPL, AttentionImpl, select_block_impl
from lcdist_kernels.tape import KeptPass


class FullRingKernel:
    """`RingKernel` of plain attention: a block is `[2, b, s, h_kv, d]`, keys and values."""

    def __init__(self, block_impl: AttentionImpl) -> None:
        self.block_impl = block_impl

    def queries(self, q: Tensor) -> Tensor:
        return q

    def queries_bwd(self, dqueries: Tensor, q: Tensor) -> Tensor:
        return dqueries

    def keys(self, block: Tensor, owner: int) -> tuple[Tensor, Tensor]:
        return block[0], block[1]

    def keys_bwd(self, dkeys: Tensor, dvalues: Tensor, owner: int) -> Tensor:
        return torch.stack((dkeys, dvalues))


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return this rank's shard of the output, with keys and values on a ring."""
    q, kv = _queries(ctx.rotate(q), ctx), torch.stack((ctx.rotate(k), v))
    if ctx.impl == "reference":
        return reference_ring(q, kv, FullRingKernel(TORCH_IMPL).keys, ctx).to(q.dtype)
    block_impl = select_block_impl(ctx.impl, q, "full attention under context parallelism")
    return KeptPass.apply(RingSoftmax(FullRingKernel(block_impl), ctx), q, kv)


def attend_local(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return the output of a whole sequence on one rank."""
    return full_attention(_queries(q, ctx), k, v, **ctx.kernel_arguments)


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return dense attention of a whole sequence: see `full_reference`."""
    return full_reference(_queries(q, ctx), k, v, **ctx.reference_arguments)


def _queries(q: Tensor, ctx: AttentionContext) -> Tensor:
    """Return q times the factors of `length_scale`; a rotation may come before or after."""
    if ctx.options.length_scale is None:
        return q
    # Rotary positions may be given and say nothing of the length.
    positions = replace(ctx, position_ids=None).positions(device=q.device)
    return scaled_queries(q, positions, ctx.options.length_scale)


def flops(options: FullOptions, shape: Shape) -> int:
    """Count forward operations of one layer: 4 head_dim per visible pair, s (s + 1) / 2 pairs."""
    return causal_flops(shape)


def traffic(options: FullOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends: keys and values twice around, their gradients once."""
    return ring_bytes(shape, layout, 2 * shape.head_dim)


METHOD = AttentionMethod(
    name="full",
    paper="1706.03762",
    options=FullOptions,
    layouts=KINDS,
    exchange=("ring",),
    supports=frozenset({"gqa", "varlen", "decode", "dense", "rotated"}),
    flops=flops,
    bytes=traffic,
    impls=IMPLS,
    make_cache=FullCache,
    functions=ContextFunctions(attend, reference, attend_local=attend_local),
)

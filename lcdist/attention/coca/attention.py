"""CoCA under context parallelism: a ring of collinear coefficients and values (arXiv:2309.08646).

A score is softmax_scale * q'.k', causal inside documents; `lcdist_kernels.coca` has both variants.
The key k' of a token follows from its position and from

    tau = relu((first half of t + second half of t) / 2)          [head_dim / 2],

so tau travels in place of the key. A token sends 1.5 head_dim elements, where keys and values take
2 head_dim, and the receiver computes k' from the sender's positions. Gradients travel as gradients
of tau; the owner applies the derivative of the relu. `k` and the cache hold t, the output of the
key projection.
"""

from typing import Any

import torch
from torch import Tensor

from lcdist.attention.coca.cache import TauCache
from lcdist.attention.context import AttentionContext
from lcdist.attention.facts import ContextFunctions
from lcdist.attention.interface import AttentionMethod
from lcdist.attention.shape import Shape, Traffic
from lcdist.attention.shared.checks import causal_flops
from lcdist.attention.shared.ring_softmax import RingSoftmax, reference_ring, ring_bytes
from lcdist.config.schema import CocaOptions
from lcdist.layout import KINDS, ContextLayout
from lcdist_kernels import coca_attention, coca_reference
from lcdist_kernels.coca import (
    IMPLS,
    TORCH_IMPL,
    CoCAImpl,
    check_variant,
    coca_keys,
    coca_queries,
    coca_tau,
    collinear,
    collinear_bwd,
    rotary_angles,
    select_coca_impl,
)
from lcdist_kernels.coca.transform import Angles
from lcdist_kernels.tape import KeptPass


class CocaRingKernel:
    """`RingKernel` of CoCA: a block is `[b, s, h_kv, 3 d / 2]`, tau and the value."""

    def __init__(self, ctx: AttentionContext, impl: CoCAImpl) -> None:
        self.ctx, self.variant, self.impl = ctx, ctx.options.variant, impl
        self.block_impl = impl.block

    def queries(self, q: Tensor) -> Tensor:
        return self.impl.queries(q, self._angles(q), self.variant)

    def queries_bwd(self, dqueries: Tensor, q: Tensor) -> Tensor:
        return self.impl.queries_bwd(dqueries, q, self._angles(q), self.variant)

    def keys(self, block: Tensor, owner: int) -> tuple[Tensor, Tensor]:
        tau, v = split_block(block)
        return self.impl.keys(tau, self._angles(v, owner), self.variant), v

    def keys_bwd(self, dkeys: Tensor, dvalues: Tensor, owner: int) -> Tensor:
        dtau = self.impl.keys_bwd(dkeys, self._angles(dkeys, owner), self.variant)
        return torch.cat((dtau, dvalues), -1)

    def dense_keys(self, block: Tensor, owner: int) -> tuple[Tensor, Tensor]:
        """Return the same as `keys`, computed by the dense reference, differentiable."""
        tau, v = split_block(block)
        return coca_keys(tau, self.ctx.rotary, self.ctx.positions(owner), self.variant), v

    def _angles(self, like: Tensor, owner: int | None = None) -> Angles:
        return rotary_angles(self.ctx.rotary, self.ctx.positions(owner), like, like.shape[3])


def split_block(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return tau `[b, s, h_kv, d / 2]` and the value `[b, s, h_kv, d]` of a block."""
    half = block.shape[3] // 3
    return block[..., :half], block[..., half:]


class _PackBlock(torch.autograd.Function):
    """(t, v) -> the block of tau and v. Saves the block alone, which the ring saves anyway."""

    @staticmethod
    def forward(node: Any, t: Tensor, v: Tensor) -> Tensor:
        block = torch.cat((collinear(t), v), -1)
        node.save_for_backward(block)
        return block

    @staticmethod
    def backward(node: Any, dblock: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (block,) = node.saved_tensors
        dtau, dv = split_block(dblock)
        return collinear_bwd(dtau, split_block(block)[0]), dv


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return this rank's shard of the output, with tau and values on a ring.

    k: t, before averaging and relu. Raises ValueError if head_dim is odd or the rotary does not
    turn all of it.
    """
    check_variant(ctx.options.variant, q.shape[3])
    if ctx.impl == "reference":
        kernel = CocaRingKernel(ctx, TORCH_IMPL)
        rotated = coca_queries(q, ctx.rotary, ctx.positions(), ctx.options.variant)
        block = torch.cat((coca_tau(k), v), -1)
        return reference_ring(rotated, block, kernel.dense_keys, ctx).to(q.dtype)
    impl = select_coca_impl(ctx.impl, q, "coca attention under context parallelism")
    return KeptPass.apply(RingSoftmax(CocaRingKernel(ctx, impl), ctx), q, _PackBlock.apply(k, v))


def attend_local(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return the output of a whole sequence on one rank; k is t."""
    return coca_attention(q, k, v, variant=ctx.options.variant, **ctx.kernel_arguments)


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return dense attention of a whole sequence: see `coca_reference`."""
    return coca_reference(q, k, v, variant=ctx.options.variant, **ctx.reference_arguments)


def flops(options: CocaOptions, shape: Shape) -> int:
    """Count forward operations of one layer: as in full attention, a score is one dot product."""
    return causal_flops(shape)


def traffic(options: CocaOptions, shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends: 3/4 of full attention's, as tau is half a key."""
    return ring_bytes(shape, layout, shape.head_dim // 2 + shape.head_dim)


METHOD = AttentionMethod(
    name="coca",
    paper="2309.08646",
    options=CocaOptions,
    layouts=KINDS,
    exchange=("ring",),
    supports=frozenset({"gqa", "varlen", "decode"}),
    flops=flops,
    bytes=traffic,
    impls=IMPLS,
    make_cache=TauCache,
    functions=ContextFunctions(attend, reference, attend_local=attend_local),
)

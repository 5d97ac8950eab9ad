"""LSSA and LSSAR under context parallelism: one pass for the mean, one for the sums (2501.13428).

    f_ij = softplus(ln(head_dim) ln(N_i) cos(q_i, k_j)),   where N_i keys are visible to query i
    out_i = sum_j w_ij v_j / sum_j w_ij,   w = f (LSSA)  or  relu(f_ij - mean of f_i)^p (LSSAR)

Every rank keeps its queries. LSSAR's first ring pass moves keys alone and gives every row its mean.
The second, which is LSSA's only one, moves keys and values. Sums over keys are plain additions in
fp32. One more sum per row makes the gradient through the mean known beforehand, so the backward
takes one pass. Gradients of directions travel back, and the owner turns them into gradients of
keys. Kernels multiply directions in the model's dtype, so directions travel: their owner makes them
once. Torch multiplies wide ones, so keys travel as they are and each receiver makes directions.
"""

import math

from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.attention.facts import ContextFunctions
from lcdist.attention.interface import AttentionMethod
from lcdist.attention.lssar.cache import DirectionCache
from lcdist.attention.lssar.ring import (
    RingKernels,
    RingLssar,
    band_of,
    reference_ring,
    reweight_of,
    token_directions,
)
from lcdist.attention.shape import Shape, Traffic
from lcdist.attention.shared.checks import causal_flops
from lcdist.config.schema import LssarOptions
from lcdist.layout import KINDS, ContextLayout
from lcdist_kernels import lssar as ops


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return this rank's shard of the output.

    ctx.softmax_scale takes the place of ln(head_dim). Raises ValueError if the power is below 1 in
    half precision.
    """
    counts, impl = band_of(ctx, ctx.rank).counts, None
    if ctx.impl != "reference":
        what = "lssar attention under context parallelism"
        impl = ops.select_lssar_impl(ctx.impl, q, what, reweight_of(ctx.options))
    if impl is ops.TRITON_IMPL:
        tables = ops.direction_tables(
            q, counts, ctx.softmax_scale, ctx.rotary, ctx.positions(ctx.rank)
        )
        return RingKernels.apply(q, k, v, ctx, tables)
    queries = token_directions(q, ctx.rank, ctx)
    queries = queries * ops.logit_scales(counts, ctx.softmax_scale, queries)
    if impl is None:
        return reference_ring(queries, k, v, ctx).to(q.dtype)
    return RingLssar.apply(queries, token_directions(k, ctx.rank, ctx), k, v, ctx, impl)


def attend_local(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return the output of a whole sequence on one rank."""
    return ops.lssar_attention(q, k, v, reweight=reweight_of(ctx.options), **ctx.kernel_arguments)


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return dense attention of a whole sequence: see `lssar_reference`."""
    return ops.lssar_reference(
        q, k, v, reweight=reweight_of(ctx.options), **ctx.reference_arguments
    )


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
    make_cache=DirectionCache,
    functions=ContextFunctions(attend, reference, attend_local=attend_local),
)

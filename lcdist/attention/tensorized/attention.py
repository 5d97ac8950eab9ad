"""Tensorized (lexicographic) attention under context parallelism; after arXiv:2410.20926.

A document is folded into modes of n_1 (finest), n_2, ... tokens. With S_j the scores inside fibres
of mode j, U_0 = v and one softmax over all branches j of a query,

    U_j = softmax(S_j) U_{j-1},     out = sum_j softmax(S_j + bias_j | past in mode j) U_{j-1}

(`lcdist_kernels.tensorized.reference` has the branches). The paper's causal masks are not public:
this is our operator, and no parity with the paper is claimed. Shards are whole blocks, so that all
modes but the coarsest are local; the coarsest is swapped in and its result swapped back
(`tensorized_units`), and with local_blocks > 1 the blocks before a shard are shifted to it. Without
modes it is full attention, swapped over key heads as in DeepSpeed-Ulysses (arXiv:2309.14509).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.interface import AttentionMethod
from lcdist.attention.shape import HeadSlice, Shape
from lcdist.attention.shared.checks import check_shard, held_heads
from lcdist.attention.tensorized.plan import grid_of, traffic
from lcdist.attention.tensorized.reference import reference_units
from lcdist.attention.tensorized.units import Sharded, ShardedTensorized
from lcdist.config.schema import TensorizedOptions
from lcdist.exchange import Group, group_rank
from lcdist.layout import ContextLayout, pieces_needed
from lcdist_kernels import Rotary, tensorized_attention, tensorized_reference
from lcdist_kernels import tensorized as ops
from lcdist_kernels.common import (
    check_impl,
    check_qkv,
    document_starts,
    wide_dtype,
)
from lcdist_kernels.tensorized import ModeGrid, ModeRotary


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: TensorizedOptions,
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
    their own. params: branch_bias `[len(modes), heads]`, of the model's query heads or the
    tensor's. impl: one of `METHOD.impls`.

    Raises ValueError where shapes, layout and group do not fit, a shard is not whole blocks, a
    document starts inside one, options do not go together, `impl` is not built, or
    "triton" does not take the tensors.
    """
    check_impl(impl, "tensorized", ops.IMPLS)
    check_qkv(q, k, v)
    check_shard(q, k, layout, group)
    grid, bias = _asked(options, params, heads, q, k)
    _check_layout(grid, layout)
    starts = document_starts(cu_seqlens, torch.arange(layout.seqlen), layout.seqlen)
    ops.check_documents(starts, grid)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    if layout.cp_size == 1:
        return tensorized_attention(
            q,
            k,
            v,
            grid=grid,
            branch_bias=bias,
            rotary=rotary,
            cu_seqlens=cu_seqlens,
            softmax_scale=scale,
            impl=impl,
        )
    index = layout.positions(group_rank(group))
    turning = ModeRotary(grid, rotary, index - starts[index], scale)
    chosen = "torch" if impl == "reference" else impl
    operator = ops.select_tensorized_impl(chosen, q, "tensorized attention on shards")
    around = Sharded(layout, group, turning, starts, k.shape[2], operator)
    if impl == "reference":
        return reference_units(q, k, v, bias, around)
    return ShardedTensorized.apply(q, k, v, bias, around)


def _asked(
    options: TensorizedOptions,
    params: Mapping[str, Tensor] | None,
    heads: HeadSlice | None,
    q: Tensor,
    k: Tensor,
) -> tuple[ModeGrid, Tensor]:
    """The grid, and the bias of the tensor's own heads in the wider of fp32 and q.dtype."""
    held = held_heads(heads, q, k)
    grid = grid_of(options, held, (q.shape[2], k.shape[2]))
    given = dict(params or {})
    names = {"branch_bias"} if grid.modes else set()
    if given and set(given) != names:
        raise ValueError(
            f"params = {sorted(given)}: tensorized attention with modes = {grid.modes} has "
            f"{sorted(names) or 'no learnable extras'}"
        )
    bias = given.get("branch_bias")
    if bias is None:
        bias = ops.initial_bias(grid.modes, q.shape[2])
    elif bias.shape[-1] == held.nheads:
        bias = bias[..., held.first : held.first + q.shape[2]]
    ops.check_bias(bias, grid, q.shape[2])
    return grid, bias.to(q.device, wide_dtype(q.dtype))


def _check_layout(grid: ModeGrid, layout: ContextLayout) -> None:
    if layout.cp_size > 1 and layout.kind != "contiguous":
        raise ValueError(
            f"layout kind {layout.kind!r}: tensorized attention has contiguous shards; "
            "use layout = 'contiguous'"
        )
    if layout.cp_size > 1 and layout.local_seqlen % grid.block:
        raise ValueError(
            f"seqlen = {layout.seqlen} on cp_size = {layout.cp_size} ranks: a shard has "
            f"{layout.local_seqlen} tokens, which must be a multiple of {grid.block}, the product "
            f"of modes = {grid.modes}; make seqlen a multiple of {grid.block * layout.cp_size}"
        )


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: TensorizedOptions,
    rotary: Rotary | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
) -> Tensor:
    """The same on the whole sequence, dense, in one process: see `tensorized_reference`."""
    grid, bias = _asked(options, params, heads, q, k)
    return tensorized_reference(
        q,
        k,
        v,
        grid=grid,
        branch_bias=bias,
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
    options: TensorizedOptions,
    positions: Tensor,
    rotary: Rotary | None = None,
    softmax_scale: float | None = None,
    params: Mapping[str, Tensor] | None = None,
    heads: HeadSlice | None = None,
    state: dict[str, Any] | None = None,
) -> Tensor:
    """Attention of new tokens over a cache that holds their own keys and values already.

    q `[b, n, h, d]`, un-rotated, at `positions`: integers on the CPU `[n]`, which go on where the
    last call ended, from 0. k_cache, v_cache `[b, s_cache, h_kv, d]`, un-rotated: entry j belongs
    to position j; entries after the greatest position are not read. state: what closed blocks
    became and the open block's queries, kept here by this function; empty at the start, None for a
    call that starts at 0 and is the only one. No gradients; out is like q. Raises ValueError where
    shapes do not fit, a position lies outside the cache, or positions do not go on.
    """
    check_qkv(q, k_cache, v_cache)
    grid, bias = _asked(options, params, heads, q, k_cache)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    turning = ModeRotary(grid, rotary, positions, scale)
    return ops.decode_step(q, k_cache, v_cache, bias, turning, {} if state is None else state)


def flops(options: TensorizedOptions, shape: Shape) -> int:
    """Forward operations of one layer: 4 head_dim for each visible pair of a branch, and of a hop.

    Hops run over whole blocks, the last and unfinished one included, and with hop_heads "kv" once
    a key head.
    """
    if shape.seqlen is None:
        raise ValueError(f"{shape}: seqlen is needed to count operations")
    heads = shape.heads or HeadSlice(0, shape.nheads, 0, shape.nheads_kv)
    grid = grid_of(options, heads, (shape.nheads, shape.nheads_kv))
    hop_heads = shape.nheads if grid.hop_heads == "q" else shape.nheads_kv
    blocks = -(-shape.seqlen // grid.block)
    hops = blocks * grid.block * sum(grid.modes)
    pairs = shape.nheads * ops.branch_pairs(grid, shape.seqlen) + hop_heads * hops
    return 4 * shape.batch * shape.head_dim * pairs


def multiple_of(options: TensorizedOptions, cp_size: int, kind: str = "contiguous") -> int:
    """Whole blocks of the product of modes on every rank."""
    return pieces_needed(kind, cp_size) * ModeGrid(options.modes).block


def parameters(options: TensorizedOptions, nheads: int) -> dict[str, tuple[int, ...]]:
    """branch_bias, one scalar a coarse mode and query head; nothing without modes."""
    return {"branch_bias": (len(options.modes), nheads)} if options.modes else {}


def initial(options: TensorizedOptions, nheads: int) -> dict[str, Tensor]:
    """Log strides, as a key of a coarse mode stands for so many tokens: see `initial_bias`."""
    if not options.modes:
        return {}
    return {"branch_bias": ops.initial_bias(options.modes, nheads).to(torch.float32)}


def check(
    options: TensorizedOptions, layout: ContextLayout, heads: HeadSlice, tp_size: int
) -> None:
    """Raises ValueError as `attention` would, before anything runs."""
    held = heads.nheads // tp_size, max(1, heads.nheads_kv // tp_size)
    _check_layout(grid_of(options, heads, held), layout)


def exchange_for(options: TensorizedOptions) -> tuple[str, ...]:
    """The halo needs `shift`; one local block, or no mode, has none."""
    return ("swap", "shift") if options.modes and options.local_blocks > 1 else ("swap",)


METHOD = AttentionMethod(
    name="tensorized",
    paper="2410.20926",
    options=TensorizedOptions,
    layouts=("contiguous",),
    exchange=("swap", "shift"),
    supports=frozenset({"gqa", "varlen", "decode", "state"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    reference=reference,
    attention=attention,
    decode=decode,
    parameters=parameters,
    exchange_for=exchange_for,
    initial=initial,
    impls=ops.IMPLS,
    check=check,
)

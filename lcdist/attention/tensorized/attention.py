"""Tensorized (lexicographic) attention under context parallelism; after arXiv:2410.20926.

A document is folded into modes of n_1 (finest), n_2, ... tokens. With S_j the scores inside fibres
of mode j, U_0 = v and one softmax over all branches j of a query,

    U_j = softmax(S_j) U_{j-1},     out = sum_j softmax(S_j + bias_j | past in mode j) U_{j-1}

(`lcdist_kernels.tensorized.reference` defines the branches). The paper's causal masks are not
public: this is our operator, and no parity with the paper is claimed. Shards are whole blocks, so
all modes but the coarsest are local. The coarsest mode is exchanged with `swap` (`units.py`), and
with local_blocks > 1 the blocks before a shard are shifted to it. Without modes this is full
attention, swapped over key heads as in DeepSpeed-Ulysses (arXiv:2309.14509).
"""

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.attention.facts import ContextFunctions
from lcdist.attention.interface import AttentionMethod
from lcdist.attention.shape import HeadSlice, Shape
from lcdist.attention.tensorized.branches import grid_and_bias
from lcdist.attention.tensorized.cache import make_cache
from lcdist.attention.tensorized.plan import kept_bytes, make_grid, make_shard_plan, traffic
from lcdist.attention.tensorized.reference import reference_shard
from lcdist.attention.tensorized.units import ShardedTensorized, ShardExchange
from lcdist.config.schema import TensorizedOptions
from lcdist.layout import ContextLayout, pieces_needed
from lcdist_kernels import tensorized as ops
from lcdist_kernels import tensorized_attention, tensorized_reference
from lcdist_kernels.tensorized import ModeGrid, ModeRotary


def attend(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return this rank's shard of the output, with the coarsest mode swapped over ranks."""
    grid, bias = grid_and_bias(q, k, ctx)
    _check_layout(grid, ctx.layout)
    _check_documents(grid, ctx)
    plan = make_shard_plan(grid, k.shape[2], ctx.layout_key, ctx.documents)
    rotary = ModeRotary(grid, ctx.rotary, ctx.positions(), ctx.softmax_scale)
    dense = ctx.impl == "reference"
    impl = ops.select_tensorized_impl(
        "torch" if dense else ctx.impl, q, "tensorized attention on shards"
    )
    exchange = ShardExchange(plan, rotary, impl, ctx)
    if dense:
        return reference_shard(q, k, v, bias, exchange)
    return ShardedTensorized.apply(q, k, v, bias, exchange)


def attend_local(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return the output of a whole sequence on one rank."""
    grid, bias = grid_and_bias(q, k, ctx)
    _check_documents(grid, ctx)
    return tensorized_attention(q, k, v, grid=grid, branch_bias=bias, **ctx.kernel_arguments)


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


def _check_documents(grid: ModeGrid, ctx: AttentionContext) -> None:
    """Raise ValueError if a document starts inside a block."""
    starts = {0, *(start for start in ctx.documents or () if start < ctx.layout.seqlen)}
    ops.check_documents(torch.tensor(sorted(starts)), grid)


def reference(q: Tensor, k: Tensor, v: Tensor, ctx: AttentionContext) -> Tensor:
    """Return dense attention of a whole sequence: see `tensorized_reference`."""
    grid, bias = grid_and_bias(q, k, ctx)
    return tensorized_reference(q, k, v, grid=grid, branch_bias=bias, **ctx.reference_arguments)


def flops(options: TensorizedOptions, shape: Shape) -> int:
    """Count forward operations of one layer: 4 head_dim per visible pair of a branch and of a hop.

    Hops cover whole blocks, including the last, unfinished one. With hop_heads "kv" they count once
    per key head.
    """
    if shape.seqlen is None:
        raise ValueError(f"{shape}: seqlen is needed to count operations")
    heads = shape.heads or HeadSlice(0, shape.nheads, 0, shape.nheads_kv)
    grid = make_grid(options, heads, (shape.nheads, shape.nheads_kv))
    hop_heads = shape.nheads if grid.hop_heads == "q" else shape.nheads_kv
    blocks = -(-shape.seqlen // grid.block)
    hops = blocks * grid.block * sum(grid.modes)
    pairs = shape.nheads * ops.branch_pairs(grid, shape.seqlen) + hop_heads * hops
    return 4 * shape.batch * shape.head_dim * pairs


def multiple_of(options: TensorizedOptions, cp_size: int, kind: str = "contiguous") -> int:
    """Return the divisor that gives every rank whole blocks of the product of modes."""
    return pieces_needed(kind, cp_size) * ModeGrid(options.modes).block


def parameters(options: TensorizedOptions, nheads: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of branch_bias: one scalar per coarse mode and query head."""
    return {"branch_bias": (len(options.modes), nheads)} if options.modes else {}


def initial(options: TensorizedOptions, nheads: int) -> dict[str, Tensor]:
    """Return log strides, because a key of a coarse mode stands for that many tokens."""
    if not options.modes:
        return {}
    return {"branch_bias": ops.initial_bias(options.modes, nheads).to(torch.float32)}


def check(
    options: TensorizedOptions, layout: ContextLayout, heads: HeadSlice, tp_size: int
) -> None:
    """Raise ValueError if `attend` would, whatever the documents."""
    held = heads.nheads // tp_size, max(1, heads.nheads_kv // tp_size)
    _check_layout(make_grid(options, heads, held), layout)


def plan_entries(
    options: TensorizedOptions, layout: ContextLayout, heads: HeadSlice, tp_size: int
) -> int:
    """Count an entry a rank, and one for each rank that a halo spans."""
    cp = layout.cp_size
    reach = -(-(options.local_blocks - 1) * ModeGrid(options.modes).block // layout.local_seqlen)
    return tp_size * cp * (1 + (min(cp, reach) if options.modes else 0))


def exchange_for(options: TensorizedOptions) -> tuple[str, ...]:
    """Return the exchanges: `shift` for the halo, which one local block or no modes do not need."""
    return ("swap", "shift") if options.modes and options.local_blocks > 1 else ("swap",)


METHOD = AttentionMethod(
    name="tensorized",
    paper="2410.20926",
    options=TensorizedOptions,
    layouts=("contiguous",),
    exchange=("swap", "shift"),
    supports=frozenset({"gqa", "varlen", "decode"}),
    multiple_of=multiple_of,
    flops=flops,
    bytes=traffic,
    kept_bytes=kept_bytes,
    make_cache=make_cache,
    functions=ContextFunctions(attend, reference, attend_local=attend_local),
    parameters=parameters,
    exchange_for=exchange_for,
    initial=initial,
    impls=ops.IMPLS,
    check=check,
    plan_entries=plan_entries,
)

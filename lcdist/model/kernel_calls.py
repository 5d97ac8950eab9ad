"""Call the kernels of a run on zeros, as its layers do, so that Triton compiles them.

Which kernels Triton compiles depends on dtypes, on head_dim and other constants, and on which
sizes are multiples of 16. So attention is called at its true shape, once for every distinct layer;
norms, whose weight gradients are sums over rows, on the true rows; other operators that treat every
row alike on a few rows. No messages are sent. With packed documents the sizes of some tables depend
on the documents; then a kernel may be compiled later once more.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lcdist.attention import Shape
from lcdist.attention.context import rank_positions
from lcdist.distributed.mesh import Mesh
from lcdist.exchange.absent import LoneRank
from lcdist.model.build import DTYPES, vocab_rows
from lcdist.model.init import HEAD_NORMS
from lcdist.model.lora import is_trained
from lcdist.model.rotary import rotary_by_length
from lcdist.plan import Plan
from lcdist.plan.resolve import LayerAttention
from lcdist_kernels import Rotary, vocab_loss
from lcdist_kernels.adamw import Hyper, Tensors, adamw_
from lcdist_kernels.norm import add_norm, scale_rows
from lcdist_kernels.qkv import QkvShape, split_qkv
from lcdist_kernels.swiglu import swiglu, swiglu_gradient_

ROWS = 16


def call_kernels(plan: Plan, mesh: Mesh) -> None:
    """Call every kernel that this rank launches in a step: forward, backward and optimizer."""
    options: Any = {"dtype": DTYPES[plan.dtype], "device": mesh.device}
    parallel, model = plan.config.parallel, plan.config.model
    for layer in dict.fromkeys(plan.layers):
        _call_attention(plan, layer, (mesh.tp_rank, mesh.cp_rank), options)
    for rows in _norm_rows(plan):
        _call_norms(plan, rows, options)
    width = model.ffn_hidden_size // parallel.tp_size
    gate_up = torch.zeros(ROWS, 2 * width, requires_grad=True, **options)
    _call_backward([swiglu(gate_up)], [gate_up])
    if is_trained("decoder.layers.0.mlp.linear_fc2.weight", plan.config.lora):
        # Recomputation makes z again in the same pass.
        swiglu_gradient_(gate_up.detach(), torch.zeros(ROWS, width, **options), again=True)
    if mesh.is_last_stage:
        columns = plan.shape.padded_vocab_size // parallel.tp_size
        logits = torch.zeros(ROWS, columns, **options)
        targets = torch.zeros(ROWS, dtype=torch.int64, device=mesh.device)
        shard = mesh.tp_rank * columns, vocab_rows(model.vocab_size, columns, mesh.tp_rank)
        lse, _ = vocab_loss.stats(logits, targets, *shard)
        vocab_loss.grad_(logits, targets, lse, torch.zeros_like(lse), *shard)
    _call_adamw(options)


def _norm_rows(plan: Plan) -> set[int]:
    """Return the numbers of rows of the norms: all tokens of this rank, and those of a tile."""
    tokens, parallel = plan.shape.local_tokens, plan.config.parallel
    tile = plan.memory.mlp_chunk(tokens) or tokens
    parts = parallel.tp_size if parallel.sequence_parallel else 1
    return {max(1, rows // parts) for rows in (tokens, tile, tokens % tile or tile)}


def _call_norms(plan: Plan, rows: int, options: dict[str, Any]) -> None:
    """Call the norm with and without a residual, and its backward with and without the sum's."""
    model = plan.config.model
    x, delta = (torch.zeros(rows, model.hidden_size, **options).requires_grad_() for _ in range(2))
    weight = torch.zeros(model.hidden_size, **options)
    weight.requires_grad_(is_trained("decoder.final_layernorm.weight", plan.config.lora))
    leaves = [each for each in (x, weight) if each.requires_grad]
    for residual in (None, delta):
        total, normed, rstd = add_norm(x, residual, weight, model.norm_eps)
        _call_backward([normed], leaves)
        total, normed, rstd = add_norm(x, residual, weight, model.norm_eps)
        _call_backward([normed, total], leaves)
        scale_rows(total.detach(), rstd, weight, model.norm_eps)


def _call_adamw(options: dict[str, Any]) -> None:
    """Call the optimizer's kernel on one tensor, aligned to 16 bytes and not.

    Without a token it writes nothing.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=options["device"])
    for first in (0, 1):
        weight = torch.zeros(ROWS, **options)
        weights = [None if weight.dtype == torch.float32 else weight]
        gradients, masters, moments, squares = (
            [torch.zeros(ROWS + first, device=weight.device)[first:]] for _ in range(4)
        )
        tensors = Tensors(gradients, masters, moments, squares, weights, [0.0], [1.0])
        adamw_(tensors, totals, Hyper(1e-3, 0.9, 0.95, 1e-8, 1, 1.0))


def _call_attention(
    plan: Plan, layer: LayerAttention, ranks: tuple[int, int], options: dict[str, Any]
) -> None:
    """Call a layer's attention as rank (tp_rank, cp_rank), from the projection on, and backward."""
    tp_rank, cp_rank = ranks
    config, layout, method = plan.config, plan.layout, layer.method
    shape = plan.shape.attention_shape(config.train.micro_batch_size, tp_rank)
    borders = _two_documents(plan) if config.data.documents == "pack" else None
    rotary: Rotary | None = rotary_by_length(config.model.rope, shape.head_dim)(config.train.seqlen)
    rotation: tuple[Rotary | None, Tensor | None] = (None, None)
    # Where ranks share key heads, Megatron splits the projection, and the method rotates.
    splits = plan.shape.nheads_kv >= config.parallel.tp_size
    # The method rotates, too, what has been normalized.
    if splits and "rotated" in method.supports and not config.model.qk_norm:
        rows = None if borders is None else (borders,) * shape.batch
        rotation = rotary, rank_positions(layout, cp_rank, rows, options["device"])
        rotary = None
    q, k, v, leaves = _queries_keys_values(shape, layout.local_seqlen, splits, rotation, options)
    if config.model.qk_norm:
        weight = torch.ones(shape.head_dim, **options)
        weight.requires_grad_(is_trained(f"{HEAD_NORMS}q_layernorm.weight", config.lora))
        leaves += [weight] if weight.requires_grad else []
        q, k = (add_norm(x, None, weight, config.model.norm_eps)[1] for x in (q, k))
    heads: Any = shape.heads
    params = {
        name: whole[..., heads.first : heads.first + shape.nheads].to(**options).requires_grad_()
        for name, whole in method.initial(layer.options, heads.nheads).items()
    }
    attend = partial(
        method.attention,
        options=layer.options,
        layout=layout,
        group=LoneRank(cp_rank, layout.cp_size) if layout.cp_size > 1 else None,
        rotary=rotary,
        cu_seqlens=borders,
        params=params or None,
        heads=heads,
        impl=config.attention.impl,
    )
    if borders is None:
        out = attend(q, k, v)
    else:
        # Rows of packed documents are calls of their own.
        rows = zip(*(x.split(1) for x in (q, k, v)), strict=True)
        out = torch.cat([attend(*row) for row in rows])
    _call_backward([out.transpose(0, 1).flatten(2)], [*leaves, *params.values()])


def _queries_keys_values(
    shape: Shape,
    local_seqlen: int,
    splits: bool,
    rotation: tuple[Rotary | None, Tensor | None],
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return q, k and v, and the tensors that they were made from.

    Args:
        shape: of this rank's attention.
        local_seqlen: tokens of a sequence on this rank.
        splits: whether one kernel splits the fused projection's output.
        rotation: rotary and positions for that kernel.
        options: dtype and device.
    """
    if splits:
        qkv = QkvShape(shape.nheads_kv, shape.nheads // shape.nheads_kv, shape.head_dim)
        width = qkv.nheads_kv * (qkv.group + 2) * qkv.head_dim
        mixed = torch.zeros(local_seqlen, shape.batch, width, requires_grad=True, **options)
        return *split_qkv(mixed, qkv, *rotation), [mixed]
    q, k, v = (
        torch.zeros(shape.batch, local_seqlen, n, shape.head_dim, requires_grad=True, **options)
        for n in (shape.nheads, shape.nheads_kv, shape.nheads_kv)
    )
    return q, k, v, [q, k, v]


def _two_documents(plan: Plan) -> Tensor:
    """Return the borders of two documents that fill a row, as the loader gives them."""
    step = plan.shape.document_layout.step
    half = plan.config.train.seqlen // 2 // step * step
    return torch.tensor([0, half, plan.layout.seqlen], dtype=torch.int32)


def _call_backward(outputs: list[Tensor], leaves: list[Tensor]) -> None:
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(each) for each in outputs])

"""Tensorized attention on shards with dense maths and gradients by autograd."""

import torch
from torch import Tensor

from lcdist.attention.tensorized.units import (
    ShardExchange,
    join_unit_heads,
    rows_as_features,
    split_unit_heads,
)
from lcdist_kernels import tensorized as ops
from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full import full_partial
from lcdist_kernels.tensorized import Partial


def reference_shard(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, exchange: ShardExchange
) -> Tensor:
    """Return out, like q, with the exchanges of `ShardedTensorized` and dense blocks.

    `ShardedTensorized` is tested against it.
    """
    grid, plan, rotate = exchange.grid, exchange.plan, exchange.rotary.rotate
    wide, scale, last = wide_dtype(q.dtype), exchange.rotary.softmax_scale, len(grid.modes)
    starts, positions = exchange.ctx.starts(), exchange.ctx.positions()
    u, partial = v.to(wide), None
    for mode in range(last):
        q_mode, k_mode = rotate(q, mode), rotate(k, mode)
        k_all, u_all, k_starts, k_positions = k_mode, u, starts, positions
        if mode == 0 and plan.halo:
            halo = exchange.post_halo(k_mode, v).wait()
            k_all, u_all = torch.cat((halo[0], k_mode), 1), torch.cat((halo[1].to(wide), u), 1)
            k_starts, k_positions = plan.key_starts, plan.key_ids - plan.key_starts
        same_document = starts[:, None] == k_starts[None]
        mask = (grid.branch_mask(positions, k_positions, mode) & same_document).to(q.device)
        part = Partial(*full_partial(q_mode, _repeat_heads(k_all, u_all), u_all, mask, scale))
        partial = ops.merge_branch(partial, part, bias, mode)
        same_document = starts[:, None] == starts[None]
        fibres = (grid.hop_mask(positions, positions, mode) & same_document).to(q.device)
        u = ops.dense_hop(q_mode, k_mode, u, fibres, scale, grid)
    part = _coarsest(rotate(q, last), rotate(k, last), u, exchange)
    return ops.merge_branch(partial, part, bias, last).out.to(q.dtype)


def _repeat_heads(k: Tensor, u: Tensor) -> Tensor:
    """Return k with its heads repeated to as many as u has."""
    return k.repeat_interleave(u.shape[2] // k.shape[2], 2)


def _coarsest(q: Tensor, k: Tensor, u: Tensor, exchange: ShardExchange) -> Partial:
    """Return the partial of the coarsest mode for own tokens."""
    (batch, _, nheads, head_dim), group = q.shape, q.shape[2] // k.shape[2]
    q_units, k_units, u_units = (
        split_unit_heads(exchange.send_to_units(x.to(u.dtype)).wait(), head_dim) for x in (q, k, u)
    )
    grid, block_starts = exchange.grid, exchange.plan.block_starts
    blocks = torch.arange(len(block_starts))
    distance = grid.local_blocks if grid.modes else 0
    mask = blocks[None] <= blocks[:, None] - distance
    mask &= block_starts[:, None] == block_starts[None]
    if q_units.numel():
        k_units = _repeat_heads(k_units, u_units)
        scale = exchange.rotary.softmax_scale
        out, lse = full_partial(q_units, k_units, u_units, mask.to(q.device), scale)
    else:
        # A rank without units computes nothing, but takes part in the backward exchange.
        out, lse = q_units + k_units.sum() + u_units.sum(), q_units.sum(-1).transpose(1, 2)
    send = exchange.send_to_tokens
    out = send(join_unit_heads(out, group)).wait().reshape(q.shape)
    lse = send(join_unit_heads(rows_as_features(lse), group)).wait()
    return Partial(out, lse.reshape(batch, -1, nheads).transpose(1, 2))

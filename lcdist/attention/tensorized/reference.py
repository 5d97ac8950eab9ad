"""Tensorized attention on shards with dense maths, gradients by autograd through the exchange."""

import torch
from torch import Tensor

from lcdist.attention.tensorized.units import Sharded, rows_away, unit_heads, units
from lcdist_kernels import tensorized as ops
from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full import full_partial
from lcdist_kernels.tensorized import Partial


def reference_units(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, around: Sharded) -> Tensor:
    """What `ShardedTensorized` must meet: the same exchange, dense blocks; out is like q."""
    grid, turning, index = around.grid, around.turning, around.index
    wide, scale, last = wide_dtype(q.dtype), turning.softmax_scale, len(grid.modes)
    starts, place = around.starts[index], turning.positions
    keys = around.keys
    key_starts = around.starts[keys]
    u, done = v.to(wide), None
    for mode in range(last):
        q_mode, k_mode = turning.rotate(q, mode), turning.rotate(k, mode)
        k_all, u_all, their_starts, their_place = k_mode, u, starts, place
        if mode == 0 and around.plan:
            halo = around.halo(k_mode, v).wait()
            k_all, u_all = torch.cat((halo[0], k_mode), 1), torch.cat((halo[1].to(wide), u), 1)
            their_starts, their_place = key_starts, keys - key_starts
        same = starts[:, None] == their_starts[None]
        mask = (grid.branch_mask(place, their_place, mode) & same).to(q.device)
        part = Partial(*full_partial(q_mode, _like(k_all, u_all), u_all, mask, scale))
        done = ops.merge_branch(done, part, bias, mode)
        same = starts[:, None] == starts[None]
        fibres = (grid.hop_mask(place, place, mode) & same).to(q.device)
        u = ops.dense_hop(q_mode, k_mode, u, fibres, scale, grid)
    part = _coarsest(turning.rotate(q, last), turning.rotate(k, last), u, around)
    return ops.merge_branch(done, part, bias, last).out.to(q.dtype)


def _like(k: Tensor, u: Tensor) -> Tensor:
    return k.repeat_interleave(u.shape[2] // k.shape[2], 2)


def _coarsest(q: Tensor, k: Tensor, u: Tensor, around: Sharded) -> Partial:
    (batch, _, nheads, head_dim), group = q.shape, q.shape[2] // k.shape[2]
    q_units, k_units, u_units = (
        unit_heads(around.away(x.to(u.dtype)).wait(), head_dim) for x in (q, k, u)
    )
    blocks = around.layout.seqlen // around.grid.block
    first = around.starts[:: around.grid.block] // around.grid.block
    place = torch.arange(blocks)
    apart = around.grid.local_blocks if around.grid.modes else 0
    mask = (place[None] <= place[:, None] - apart) & (first[:, None] == first[None])
    if q_units.numel():
        k_units = _like(k_units, u_units)
        scale = around.turning.softmax_scale
        out, lse = full_partial(q_units, k_units, u_units, mask.to(q.device), scale)
    else:
        # A rank without units: nothing to compute, but its part in the backward exchange.
        out, lse = q_units + k_units.sum() + u_units.sum(), q_units.sum(-1).transpose(1, 2)
    out = around.home(units(out, group)).wait().reshape(q.shape)
    lse = around.home(units(rows_away(lse), group)).wait()
    return Partial(out, lse.reshape(batch, -1, nheads).transpose(1, 2))

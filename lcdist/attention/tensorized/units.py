"""Tensorized attention over a sharded coarsest mode (Kronecker-axis sharding).

Every rank holds whole blocks, so hops and branches of the finer modes are local. For the coarsest
mode a swap gives each rank the whole mode for its units (an offset inside a block and a key head).
Another swap returns the partial result, which is merged in fp32. q and k leave before the first
hop, U after the last hop and before the other branches. The backward pass sends dout, lse and delta
in place of q, k and U, and receives dq, dk and dU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.context import AttentionContext
from lcdist.attention.tensorized.plan import ShardPlan
from lcdist.exchange import Pending, shift, swap
from lcdist_kernels import tensorized as ops
from lcdist_kernels.tape import kept
from lcdist_kernels.tensorized import ModeGrid, ModeRotary, Partial, TensorizedImpl


@dataclass(frozen=True, eq=False)
class ShardExchange:
    """Exchanges of one rank.

    Args:
        plan: this rank's plan.
        rotary: rotation of queries and keys by mode.
        impl: computes hops and branches.
        ctx: arguments of the attention call.
    """

    plan: ShardPlan
    rotary: ModeRotary
    impl: TensorizedImpl
    ctx: AttentionContext

    @property
    def grid(self) -> ModeGrid:
        return self.rotary.grid

    def send_to_units(self, *tensors: Tensor) -> Pending:
        """Post tensors `[b, s, h, d]` side by side; the result: `[b, blocks, units, features]`."""
        num_blocks = self.ctx.layout.local_seqlen // self.grid.block
        num_units = sum(self.plan.units_per_rank)
        parts = [x.reshape(len(x), num_blocks, num_units, -1) for x in tensors]
        x = torch.cat(parts, -1)
        return swap(x, 1, 2, self.ctx.group, full_sizes=self.plan.units_per_rank)

    def send_to_tokens(self, *tensors: Tensor) -> Pending:
        """Post tensors `[b, blocks, units, features]`; the result has own blocks and all units."""
        x = torch.cat(tensors, -1)
        return swap(x, 2, 1, self.ctx.group, shard_sizes=self.plan.units_per_rank)

    def post_halo(self, k: Tensor, v: Tensor) -> Pending:
        """Post the rotated keys, and the values, that branch 1 of other ranks reads."""
        return shift(torch.stack((k, v)), self.plan.halo, self.ctx.group, dim=2)

    def return_halo(self, dhalo: Tensor) -> Pending:
        """Post the halo's gradients to the ranks that own its tokens."""
        return shift(dhalo, self.plan.reversed_halo, self.ctx.group, dim=2)

    def add_returned_halo(self, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add the returned gradients of sent halo tokens to dk and dv, in place."""
        first = 0
        for start, stop in self.plan.send_ranges:
            for total, part in zip((dk, dv), returned, strict=True):
                total[:, start:stop] += part[:, first : first + stop - start]
            first += stop - start


def split_unit_heads(x: Tensor, head_dim: int) -> Tensor:
    """[b, blocks, units, width x head_dim] -> [b, blocks, units x width, head_dim]."""
    return x.reshape(*x.shape[:2], x.shape[2] * (x.shape[3] // head_dim), head_dim)


def join_unit_heads(x: Tensor, width: int) -> Tensor:
    """[b, blocks, units x width, head_dim] -> [b, blocks, units, width x head_dim]."""
    return x.reshape(*x.shape[:2], x.shape[2] // width, width * x.shape[3])


def rows_as_features(x: Tensor) -> Tensor:
    """[b, h, s] -> [b, s, h, 1]."""
    return x.transpose(1, 2)[..., None]


class ShardedTensorized(torch.autograd.Function):
    """Tensorized attention on shards, with two swaps to the units and one back in each pass.

    Saves q, k, v, the U_j, out, lse and the lambda_j; the units' q, k and U of the coarsest mode;
    and the halo.
    """

    @staticmethod
    def forward(
        node: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, exchange: ShardExchange
    ) -> Tensor:
        out, lse, *rest = kept(lambda: _attend_shard(q, k, v, bias, exchange))
        node.save_for_backward(q, k, out, lse, bias, v, *rest)
        node.exchange = exchange
        return out

    @staticmethod
    def backward(node: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, out, lse, bias, *saved = node.saved_tensors
        exchange, last = node.exchange, len(node.exchange.grid.modes)
        delta = exchange.impl.row_delta(dout, out)
        # Per branch: lse without the branch's bias.
        lses = [lse, *(lse - branch_bias[:, None] for branch_bias in bias)]
        pending_dout = exchange.send_to_units(dout)
        pending_rows = exchange.send_to_units(rows_as_features(lses[last]), rows_as_features(delta))

        values, lambdas = saved[: last + 1], saved[last + 1 : 2 * last + 1]
        unit_qku, halos = saved[2 * last + 1 : 2 * last + 4], saved[2 * last + 4 :]
        shard = _ShardPass(exchange, q, k, values, halos[0] if halos else None, unit_qku)
        grads, dbias = _GradientSums(shard, lse.dtype), torch.zeros_like(bias)
        for mode in range(1, last):
            dbias[mode - 1] = grads.add_branch(mode, dout, (lses[mode], delta))
        pending_dqku, dlogits = shard.coarsest_bwd(pending_dout.wait(), pending_rows.wait())
        if last:
            dbias[-1] = dlogits
            grads.add_branch(0, dout, (lse, delta))
        pending_halo = None if grads.dhalo is None else exchange.return_halo(grads.dhalo)
        du = grads.add_units(pending_dqku.wait())
        for mode in reversed(range(last)):
            du = grads.add_hop(du, mode, lambdas[mode])
        if pending_halo is not None:
            exchange.add_returned_halo(pending_halo.wait(), grads.by_mode[0][1], du)
        dq, dk = grads.unrotated()
        return dq.to(q.dtype), dk.to(k.dtype), du.to(q.dtype), dbias, None


def _attend_shard(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, exchange: ShardExchange
) -> list[Tensor]:
    """Return out, lse, the U_j after v, the lambda_j, the units' q, k and U, and the halo."""
    rotate, last = exchange.rotary.rotate, len(exchange.grid.modes)
    pending_qk = exchange.send_to_units(rotate(q, last), rotate(k, last))
    pending_halo = exchange.post_halo(rotate(k, 0), v) if exchange.plan.halo else None
    values, lambdas = [v], []
    for mode in range(last):
        qku = rotate(q, mode), rotate(k, mode), values[-1]
        u, lam = exchange.impl.hop_fwd(*qku, mode, exchange.rotary)
        values.append(u)
        lambdas.append(lam)
    pending_u = exchange.send_to_units(values[-1])

    halo = None if pending_halo is None else pending_halo.wait()
    shard = _ShardPass(exchange, q, k, values, halo)
    partial = None
    for mode in range(last):
        partial = ops.merge_branch(partial, shard.branch_fwd(mode), bias, mode)
    unit_qku = torch.cat((pending_qk.wait(), pending_u.wait()), -1)
    shard.unit_qku = shard.split_qku(unit_qku)
    partial = ops.merge_branch(partial, shard.coarsest_fwd(), bias, last)
    halos = [] if halo is None else [halo]
    return [
        partial.out.to(q.dtype), partial.lse, *values[1:], *lambdas, *shard.unit_qku, *halos
    ]  # fmt: skip


@dataclass
class _ShardPass:
    """A rank's tensors in one pass.

    values: v and the U_j.
    halo: rotated keys and values before the shard, `[2, b, s_halo, h_kv, d]`.
    unit_qku: q, k and U of own units of the coarsest mode.
    """

    exchange: ShardExchange
    q: Tensor
    k: Tensor
    values: Sequence[Tensor]
    halo: Tensor | None
    unit_qku: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        self.impl, self.branches = self.exchange.impl, self.exchange.plan.branches
        self.scale = self.exchange.rotary.softmax_scale
        self.head_dim, nheads_kv = self.q.shape[3], self.k.shape[2]
        # Heads per key head of q, k and U.
        self.widths = [x.shape[2] // nheads_kv for x in (self.q, self.k, self.values[-1])]

    def rotated(self, mode: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and U of own tokens for `mode`."""
        rotate = self.exchange.rotary.rotate
        return rotate(self.q, mode), rotate(self.k, mode), self.values[mode]

    def branch_qku(self, mode: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and U of a branch; branch 1 reads the halo before own tokens."""
        q, k, u = self.rotated(mode)
        if mode or self.halo is None:
            return q, k, u
        return q, torch.cat((self.halo[0], k), 1), torch.cat((self.halo[1], u), 1)

    def branch_fwd(self, mode: int) -> Partial:
        return self.impl.branch_fwd(self.branch_qku(mode), self.branches[mode], self.scale)

    def split_qku(self, x: Tensor) -> list[Tensor]:
        """Return q, k and U, or their gradients, as `[b, blocks, units x heads, head_dim]`."""
        parts = x.split([width * self.head_dim for width in self.widths], -1)
        return [split_unit_heads(part, self.head_dim) for part in parts]

    def coarsest_fwd(self) -> Partial:
        """Return the partial of the coarsest mode for own tokens, in fp32 or float64."""
        out, lse = self.impl.branch_fwd(self.unit_qku, self.branches[-1], self.scale)
        send = self.exchange.send_to_tokens
        pending_out = send(join_unit_heads(out.to(self.q.dtype), self.widths[0]))
        pending_lse = send(join_unit_heads(rows_as_features(lse), self.widths[0]))
        lse = pending_lse.wait().reshape(self.q.shape[:3]).transpose(1, 2)
        return Partial(pending_out.wait().reshape(self.q.shape).to(lse.dtype), lse)

    def coarsest_bwd(self, dout: Tensor, rows: Tensor) -> tuple[Pending, Tensor]:
        """Compute the gradients of own units and post them to the tokens' ranks.

        Args:
            dout: as received, `[b, blocks, units, features]`.
            rows: likewise, lse without bias and delta.

        Returns:
            (dq, dk, dU) in flight, and this rank's share of the bias gradient `[h]`.
        """
        lse, delta = (split_unit_heads(x, 1)[..., 0].transpose(1, 2) for x in rows.chunk(2, -1))
        grads = self.impl.branch_bwd(
            split_unit_heads(dout, self.head_dim),
            self.unit_qku,
            (lse, delta),
            self.branches[-1],
            self.scale,
        )
        dqku = [
            join_unit_heads(x.to(self.q.dtype), width)
            for x, width in zip(grads[:3], self.widths, strict=True)
        ]
        units_per_rank, rank = self.exchange.plan.units_per_rank, self.exchange.ctx.rank
        first, nheads_kv, group = sum(units_per_rank[:rank]), self.k.shape[2], self.widths[0]
        unit_ids = torch.arange(first, first + units_per_rank[rank], device=lse.device)
        by_unit = grads.dlogits.sum((0, 2)).reshape(units_per_rank[rank], group)
        by_head = by_unit.new_zeros(nheads_kv, group).index_add_(0, unit_ids % nheads_kv, by_unit)
        return self.exchange.send_to_tokens(*dqku), by_head.flatten()


class _GradientSums:
    """Gradients of a rank's own tokens, added up by mode in fp32 or float64.

    by_mode: dq and dk as rotated for the mode, and dU.
    dhalo: gradient of the halo's keys and values.
    """

    def __init__(self, shard: _ShardPass, dtype: torch.dtype) -> None:
        self.shard, self.dtype = shard, dtype
        self.dhalo: Tensor | None = None
        self.by_mode: dict[int, list[Tensor]] = {}

    def add_branch(self, mode: int, dout: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        """Add a branch of own tokens; return its share of the bias gradient `[h]`."""
        shard = self.shard
        qku, branch = shard.branch_qku(mode), shard.branches[mode]
        grads = shard.impl.branch_bwd(dout, qku, rows, branch, shard.scale)
        dq, dk, du = grads[:3]
        if mode == 0 and shard.halo is not None:
            halo_size = shard.halo.shape[2]
            self.dhalo = torch.stack((dk[:, :halo_size], du[:, :halo_size]))
            dk, du = dk[:, halo_size:].contiguous(), du[:, halo_size:].contiguous()
        self.by_mode[mode] = [dq, dk, du]
        return grads.dlogits.sum((0, 2))

    def add_units(self, received: Tensor) -> Tensor:
        """Add the received gradients of the coarsest mode; return dU."""
        shard, last = self.shard, len(self.shard.values) - 1
        parts = received.split([width * shard.head_dim for width in shard.widths], -1)
        shapes = (shard.q.shape, shard.k.shape, shard.values[-1].shape)
        grads = [
            part.reshape(shape).to(self.dtype) for part, shape in zip(parts, shapes, strict=True)
        ]
        self.by_mode[last] = grads
        return grads[2]

    def add_hop(self, du: Tensor, mode: int, lam: Tensor) -> Tensor:
        """Add the hop of `mode`, given dU of its result; return dU of its input."""
        shard = self.shard
        hopped = (shard.values[mode + 1], lam)
        rotary = shard.exchange.rotary
        grads = shard.impl.hop_bwd(du, shard.rotated(mode), hopped, mode, rotary)
        for total, grad in zip(self.by_mode[mode], grads, strict=True):
            total += grad
        return self.by_mode[mode][2]

    def unrotated(self) -> tuple[Tensor, Tensor]:
        """Return (dq, dk) summed over modes, each rotated back."""
        rotate_back = self.shard.exchange.rotary.rotate_back
        dq, dk = (torch.zeros_like(x, dtype=self.dtype) for x in (self.shard.q, self.shard.k))
        for mode, (dq_mode, dk_mode, _) in self.by_mode.items():
            dq += rotate_back(dq_mode, mode)
            dk += rotate_back(dk_mode, mode)
        return dq, dk

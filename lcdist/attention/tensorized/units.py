"""Tensorized attention over a sharded coarsest mode (Kronecker-axis sharding).

Every rank holds whole blocks, so hops and branches of the other modes are its own affair. For the
coarsest mode one swap makes the mode whole on every rank for its units (an offset inside a block
and a key head), and one brings the partial back, which is merged in fp32. q and k leave before the
first hop, U after the last one and before the other branches. The backward sends dout, lse and
delta in the place of q, k and U, and gets dq, dk and dU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.tensorized.plan import halo_plan, halo_tokens, plan_home, unit_sizes
from lcdist.exchange import Group, Interval, Pending, group_rank, shift, swap
from lcdist.layout import ContextLayout
from lcdist_kernels import tensorized as ops
from lcdist_kernels.tensorized import Branch, ModeGrid, ModeRotary, Partial, TensorizedImpl


@dataclass(frozen=True)
class Sharded:
    """Who takes part, whose tokens are whose; starts: the first token of each token's document."""

    layout: ContextLayout
    group: Group
    turning: ModeRotary
    starts: Tensor
    nheads_kv: int
    operator: TensorizedImpl

    @property
    def grid(self) -> ModeGrid:
        return self.turning.grid

    @property
    def index(self) -> Tensor:
        """This rank's global token numbers."""
        return self.layout.positions(group_rank(self.group))

    @property
    def plan(self) -> list[Interval]:
        """How the halo travels; empty where branch 1 stays inside blocks."""
        if not self.grid.modes:
            return []
        return halo_plan(self.grid, self.layout.local_seqlen, self.layout.cp_size)

    @property
    def keys(self) -> Tensor:
        """Whose keys branch 1 has at hand: the halo's tokens, then the own ones."""
        index = self.index
        halo = halo_tokens(self.plan, group_rank(self.group))
        return torch.arange(int(index[0]) - halo, int(index[-1]) + 1)

    def branches(self) -> list[Branch]:
        """Those of this rank's own tokens, finest first, and at the end that of its units."""
        index, keys = self.index, self.keys
        starts, modes = self.starts[index], range(len(self.grid.modes))
        fine = [ops.fine_branch(mode, index, starts, keys, self.grid) for mode in modes]
        # Units are fibres already: their blocks are the tokens of a sequence.
        return [*fine, Branch(ops.coarsest_branch(self.starts, self.grid).band)]

    def sizes(self) -> list[int]:
        """Units of every rank."""
        return unit_sizes(self.grid, self.nheads_kv, self.layout.cp_size)

    def away(self, *tensors: Tensor) -> Pending:
        """Posts tensors `[b, s, h, d]` side by side: gives `[b, blocks, units, features]`."""
        blocks = self.layout.local_seqlen // self.grid.block
        units = self.grid.block * self.nheads_kv
        parts = [x.reshape(len(x), blocks, units, -1) for x in tensors]
        return swap(torch.cat(parts, -1), 1, 2, self.group, full_sizes=self.sizes())

    def home(self, *tensors: Tensor) -> Pending:
        """Posts tensors `[b, blocks, units, features]`: gives own blocks, all units."""
        return swap(torch.cat(tensors, -1), 2, 1, self.group, shard_sizes=self.sizes())

    def halo(self, k: Tensor, v: Tensor) -> Pending:
        """Posts the rotated keys, and the values, that other ranks' branch 1 reads."""
        return shift(torch.stack((k, v)), self.plan, self.group, dim=2)

    def halo_home(self, dhalo: Tensor) -> Pending:
        return shift(dhalo, plan_home(self.plan), self.group, dim=2)

    def add_halo(self, came: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Adds to dk and dv what came home."""
        first = 0
        for src, _, start, stop in self.plan:
            if src == group_rank(self.group):
                for total, part in zip((dk, dv), came, strict=True):
                    total[:, start:stop] += part[:, first : first + stop - start]
                first += stop - start


def unit_heads(x: Tensor, head_dim: int) -> Tensor:
    """[b, blocks, units, width x head_dim] -> [b, blocks, units x width, head_dim]."""
    return x.reshape(*x.shape[:2], x.shape[2] * (x.shape[3] // head_dim), head_dim)


def units(x: Tensor, width: int) -> Tensor:
    """Its inverse."""
    return x.reshape(*x.shape[:2], x.shape[2] // width, width * x.shape[3])


def rows_away(x: Tensor) -> Tensor:
    """[b, h, s] -> [b, s, h, 1], and the other way round for what is there."""
    return x.transpose(1, 2)[..., None]


class ShardedTensorized(torch.autograd.Function):
    """Two swaps away and one home, forward and backward.

    Kept: q, k, v, the U_j, out, lse and the lambda_j; of the coarsest mode the units' q, k and U;
    and the halo.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, around: Sharded) -> Tensor:
        turning, last = around.turning, len(around.grid.modes)
        sent = around.away(turning.rotate(q, last), turning.rotate(k, last))
        halo = around.halo(turning.rotate(k, 0), v) if around.plan else None
        values, lambdas = [v], []
        for mode in range(last):
            q_mode, k_mode = turning.rotate(q, mode), turning.rotate(k, mode)
            u, lam = around.operator.hop_fwd(q_mode, k_mode, values[-1], mode, turning)
            values.append(u)
            lambdas.append(lam)
        sent_u = around.away(values[-1])

        run = _Run(around, q, k, values, None if halo is None else halo.wait())
        done = None
        for mode in range(last):
            part = run.operator.branch_fwd(run.qku(mode), run.branches[mode], run.scale)
            done = ops.merge_branch(done, part, bias, mode)
        run.unit_qku = run.from_units(torch.cat((sent.wait(), sent_u.wait()), -1))
        done = ops.merge_branch(done, run.coarsest_fwd(), bias, last)
        out, lse = done.out.to(q.dtype), done.lse
        halos = [] if run.halo is None else [run.halo]
        ctx.save_for_backward(q, k, out, lse, bias, *values, *lambdas, *run.unit_qku, *halos)
        ctx.around = around
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, out, lse, bias, *kept = ctx.saved_tensors
        around, last = ctx.around, len(ctx.around.grid.modes)
        delta = around.operator.row_delta(dout, out)
        lses = [lse, *(lse - one[:, None] for one in bias)]  # less each branch's bias
        sent = around.away(dout)
        sent_rows = around.away(rows_away(lses[last]), rows_away(delta))

        values, lambdas = kept[: last + 1], kept[last + 1 : 2 * last + 1]
        unit_qku, halos = kept[2 * last + 1 : 2 * last + 4], kept[2 * last + 4 :]
        run = _Run(around, q, k, values, halos[0] if halos else None, unit_qku)
        grads, dbias = _Totals(run, lse.dtype), torch.zeros_like(bias)
        for mode in range(1, last):
            dbias[mode - 1] = grads.add_branch(mode, dout, (lses[mode], delta))
        coming, dlogits = run.coarsest_bwd(sent.wait(), sent_rows.wait())
        if last:
            dbias[-1] = dlogits
            grads.add_branch(0, dout, (lse, delta))
        dhalo = around.halo_home(grads.dhalo) if grads.dhalo is not None else None
        g = grads.add_units(coming.wait())
        for mode in reversed(range(last)):
            g = grads.add_hop(g, mode, lambdas[mode])
        if dhalo is not None:
            grads.add_halo(dhalo.wait(), g)
        dq, dk = grads.home()
        return dq.to(q.dtype), dk.to(k.dtype), g.to(q.dtype), dbias, None


@dataclass
class _Run:
    """A rank's tensors in one pass. values: v and the U_j; unit_qku: of the coarsest mode."""

    around: Sharded
    q: Tensor
    k: Tensor
    values: Sequence[Tensor]
    halo: Tensor | None
    unit_qku: Sequence[Tensor] = ()

    def __post_init__(self) -> None:
        self.branches = self.around.branches()
        self.scale, self.operator = self.around.turning.softmax_scale, self.around.operator
        self.head_dim, nheads_kv = self.q.shape[3], self.k.shape[2]
        self.widths = [x.shape[2] // nheads_kv for x in (self.q, self.k, self.values[-1])]

    def turned(self, mode: int) -> tuple[Tensor, Tensor, Tensor]:
        turn = self.around.turning.rotate
        return turn(self.q, mode), turn(self.k, mode), self.values[mode]

    def qku(self, mode: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of a branch: branch 1 has the halo's keys and values before its own."""
        q, k, u = self.turned(mode)
        if mode or self.halo is None:
            return q, k, u
        return q, torch.cat((self.halo[0], k), 1), torch.cat((self.halo[1], u), 1)

    def from_units(self, x: Tensor) -> list[Tensor]:
        """q, k and U, or their gradients, as `[b, blocks, units x heads, head_dim]`."""
        parts = x.split([width * self.head_dim for width in self.widths], -1)
        return [unit_heads(part, self.head_dim) for part in parts]

    def coarsest_fwd(self) -> Partial:
        """The partial of the coarsest mode at home, like q and `[b, h, s]`, in fp32 or float64."""
        out, lse = self.operator.branch_fwd(self.unit_qku, self.branches[-1], self.scale)
        out_home = self.around.home(units(out.to(self.q.dtype), self.widths[0]))
        lse_home = self.around.home(units(rows_away(lse), self.widths[0]))
        lse = lse_home.wait().reshape(self.q.shape[:3]).transpose(1, 2)
        return Partial(out_home.wait().reshape(self.q.shape).to(lse.dtype), lse)

    def coarsest_bwd(self, dout: Tensor, rows: Tensor) -> tuple[Pending, Tensor]:
        """(dq, dk, dU under way home, the share of the bias `[h]`).

        dout and rows (lse less bias, delta): as they came, `[b, blocks, units, ...]`.
        """
        lse, delta = (unit_heads(x, 1)[..., 0].transpose(1, 2) for x in rows.chunk(2, -1))
        found = self.operator.branch_bwd(
            unit_heads(dout, self.head_dim),
            self.unit_qku,
            (lse, delta),
            self.branches[-1],
            self.scale,
        )
        grads = [
            units(x.to(self.q.dtype), width)
            for x, width in zip(found[:3], self.widths, strict=True)
        ]
        sizes, rank = self.around.sizes(), group_rank(self.around.group)
        first, nheads_kv, group = sum(sizes[:rank]), self.k.shape[2], self.widths[0]
        head = torch.arange(first, first + sizes[rank], device=lse.device) % nheads_kv
        share = found.dlogits.sum((0, 2)).reshape(sizes[rank], group)
        total = share.new_zeros(nheads_kv, group).index_add_(0, head, share)
        return self.around.home(*grads), total.flatten()


class _Totals:
    """Gradients of a rank's own tokens, added up in fp32 or float64: by mode, as rotated there."""

    def __init__(self, run: _Run, dtype: torch.dtype) -> None:
        self.run, self.dtype = run, dtype
        self.dhalo: Tensor | None = None
        self.parts: dict[int, list[Tensor]] = {}

    def add_branch(self, mode: int, dout: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        """Adds a branch of the own tokens; gives the share of its bias `[h]`."""
        run = self.run
        found = run.operator.branch_bwd(dout, run.qku(mode), rows, run.branches[mode], run.scale)
        dq, dk, du = found[:3]
        if mode == 0 and run.halo is not None:
            before = run.halo.shape[2]
            self.dhalo = torch.stack((dk[:, :before], du[:, :before]))
            dk, du = dk[:, before:].contiguous(), du[:, before:].contiguous()
        self.parts[mode] = [dq, dk, du]
        return found.dlogits.sum((0, 2))

    def add_units(self, came: Tensor) -> Tensor:
        """Takes what came home of the coarsest mode; gives dU."""
        run, last = self.run, len(self.run.values) - 1
        parts = came.split([width * run.head_dim for width in run.widths], -1)
        shapes = (run.q.shape, run.k.shape, run.values[-1].shape)
        found = [
            part.reshape(shape).to(self.dtype) for part, shape in zip(parts, shapes, strict=True)
        ]
        self.parts[last] = found
        return found[2]

    def add_hop(self, g: Tensor, mode: int, lam: Tensor) -> Tensor:
        """Adds the hop of `mode` whose U has the gradient g; gives that of what it is made of."""
        run = self.run
        hopped = (run.values[mode + 1], lam)
        found = run.operator.hop_bwd(g, run.turned(mode), hopped, mode, run.around.turning)
        for total, more in zip(self.parts[mode], found, strict=True):
            total += more
        return self.parts[mode][2]

    def add_halo(self, came: Tensor, dv: Tensor) -> None:
        self.run.around.add_halo(came, self.parts[0][1], dv)

    def home(self) -> tuple[Tensor, Tensor]:
        """(dq, dk), turned back."""
        back = self.run.around.turning.rotate_back
        dq, dk = (torch.zeros_like(x, dtype=self.dtype) for x in (self.run.q, self.run.k))
        for mode, (dq_mode, dk_mode, _) in self.parts.items():
            dq += back(dq_mode, mode)
            dk += back(dk_mode, mode)
        return dq, dk

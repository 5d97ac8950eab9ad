"""SCCA's window rules under context parallelism: keys are shifted to where they are seen.

Each rank keeps its queries and gets, for each set of heads with one rule, the intervals of keys and
values that its own do not hold; what is local is computed while they travel, the rest is merged to
it in fp32. The backward computes the foreign share first, sends it home by the reversed plan and
computes the local share meanwhile; gradients travel in the wider of fp32 and their dtype, as a key
may have several readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.scca.shift_plan import Moves, borders_of, moves
from lcdist.attention.shape import Shape, Traffic
from lcdist.attention.shared.checks import tokens
from lcdist.exchange import Group, Pending, group_rank, shift
from lcdist.layout import ContextLayout
from lcdist_kernels.common import document_starts
from lcdist_kernels.full import TORCH_IMPL, AttentionImpl, full_partial
from lcdist_kernels.scca import (
    HeadGroup,
    Part,
    Rule,
    banded_bwd,
    banded_fwd,
    dense_mask,
    head_groups,
    window_parts,
)

ALL = slice(None)


@dataclass(frozen=True)
class Windows:
    """The window rules of a rank's heads, and who holds which token. Heads of other rules rest."""

    groups: tuple[HeadGroup, ...]
    layout: ContextLayout
    group: Group
    cu_seqlens: Tensor | None
    softmax_scale: float
    operator: AttentionImpl = TORCH_IMPL

    def moves(self, of: HeadGroup) -> Moves:
        """What travels for one group of heads."""
        return moves(window_rules(of), self.layout, borders_of(self.cu_seqlens))

    def local_parts(self) -> list[Part]:
        """What this rank's queries see of its own keys."""
        index = self.layout.positions(group_rank(self.group))
        return [part for of in self.groups for part in self._parts(of, index, of.kv)]

    def foreign_parts(self, of: HeadGroup) -> list[Part]:
        """What they see of the keys that arrive for a group of heads, which hold those alone."""
        return self._parts(of, self.moves(of).arrived(group_rank(self.group)), ALL)

    def _parts(self, of: HeadGroup, k_idx: Tensor, held: slice) -> list[Part]:
        index, starts = tokens(self.layout, group_rank(self.group), self.cu_seqlens)
        return [
            part
            for members, rule in of.members
            if rule.is_window
            for part in window_parts(
                rule, (of.kv, held, members), index, starts, k_idx, self.operator
            )
        ]


def window_rules(of: HeadGroup) -> tuple[Rule, ...]:
    """The window rules of a group's heads."""
    return tuple(rule for _, rule in of.members if rule.is_window)


def _post(k: Tensor, v: Tensor, of: HeadGroup, around: Windows) -> tuple[Pending, Pending] | None:
    plan = around.moves(of).intervals
    if not plan:
        return None
    return shift(k[:, :, of.kv], plan, around.group), shift(v[:, :, of.kv], plan, around.group)


class ShiftedWindows(torch.autograd.Function):
    """Window rules over a shift of keys; kept: q, k, v, the keys and values got, out and lse.

    q `[b, s, h_kv, h / h_kv, d]`, rotated as k is; out is like q, 0 for heads without windows.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, around: Windows) -> Tensor:
        posted = [(of, _post(k, v, of, around)) for of in around.groups]
        scale, operator = around.softmax_scale, around.operator
        done = banded_fwd(q, k, v, around.local_parts(), scale, impl=operator)
        got: list[Tensor] = []
        for of, pair in posted:
            if pair is not None:
                k_got, v_got = pair[0].wait(), pair[1].wait()
                parts = around.foreign_parts(of)
                done = banded_fwd(q, k_got, v_got, parts, scale, done, impl=operator)
                got += (k_got, v_got)
        out = done[0].to(q.dtype)
        ctx.save_for_backward(q, k, v, out, done[1], *got)
        ctx.around = around
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse, *got = ctx.saved_tensors
        around, scale = ctx.around, ctx.around.softmax_scale
        operator = around.operator
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        homeward = []
        for of in around.groups:
            if not around.moves(of).intervals:
                continue
            (k_got, v_got), got = got[:2], got[2:]
            parts, plan = around.foreign_parts(of), around.moves(of).back()
            shares = banded_bwd(dout, q, k_got, v_got, (out, lse), parts, dq, scale, impl=operator)
            pair = [shift(share, plan, around.group) for share in shares]
            homeward.append((of, pair))
        dkv = banded_bwd(dout, q, k, v, (out, lse), around.local_parts(), dq, scale, impl=operator)
        for of, pair in homeward:
            leaving = around.moves(of).leaving(group_rank(around.group))
            for grad, pending in zip(dkv, pair, strict=True):
                pieces = pending.wait().split([stop - start for start, stop in leaving], 1)
                for (start, stop), piece in zip(leaving, pieces, strict=True):
                    grad[:, start:stop, of.kv].add_(piece)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None


def reference_windows(q: Tensor, k: Tensor, v: Tensor, around: Windows) -> Tensor:
    """Dense maths on what arrives, gradients by autograd: what `ShiftedWindows` must meet."""
    index, starts = tokens(around.layout, group_rank(around.group), around.cu_seqlens)
    out = torch.zeros_like(q)
    posted = [(of, _post(k, v, of, around)) for of in around.groups]
    for of, pair in posted:
        k_idx, k_own, v_own = index, k[:, :, of.kv], v[:, :, of.kv]
        if pair is not None:
            k_own = torch.cat((k_own, pair[0].wait()), 1)
            v_own = torch.cat((v_own, pair[1].wait()), 1)
            arrived = around.moves(of).arrived(group_rank(around.group))
            k_idx = torch.cat((index, arrived))
        k_starts = document_starts(around.cu_seqlens, k_idx, around.layout.seqlen)
        for members, rule in of.members:
            if rule.is_window:
                queries = q[:, :, of.kv, members]
                mask = dense_mask([rule], index, starts, k_idx, k_starts)[0].to(q.device)
                done, _ = full_partial(
                    queries.flatten(2, 3), k_own, v_own, mask, around.softmax_scale
                )
                done = done.to(q.dtype).view(queries.shape)
                out = _placed(out, done, (ALL, ALL, of.kv, members))
    return out


def _placed(out: Tensor, part: Tensor, where: tuple[slice, ...]) -> Tensor:
    out = out.clone()
    out[where] = part
    return out


def shift_bytes(rules: Sequence[Rule], shape: Shape, layout: ContextLayout) -> Traffic:
    """Bytes each rank sends for the window rules among `rules`, one a query head of `shape`.

    Forward the keys and values that others see, of one document as long as the layout; backward
    the gradients of those that were got, in the wider of fp32 and their dtype.
    """
    sent, returned = [0] * layout.cp_size, [0] * layout.cp_size
    for of in head_groups(rules, shape.nheads_kv):
        heads = len(range(shape.nheads_kv)[of.kv])
        token = 2 * shape.batch * heads * shape.head_dim
        for src, dst, start, stop in moves(window_rules(of), layout).intervals:
            sent[src] += (stop - start) * token * shape.itemsize
            returned[dst] += (stop - start) * token * max(4, shape.itemsize)
    return Traffic(tuple(sent), tuple(returned))

"""SCCA's window rules under context parallelism: keys are shifted to the ranks that see them.

Each rank keeps its queries. Per group of heads with the same rules it receives the intervals of
keys and values that its own shard lacks. The local part is computed during the transfer, and the
rest is merged in fp32. The backward pass computes the received part first, sends its gradients back
by the reversed plan, and computes the local part meanwhile. Gradients travel in the wider of fp32
and their dtype, because a key may have several readers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.attention.context import CPU, AttentionContext, LayoutKey, token_table
from lcdist.attention.scca.shift_plan import Documents, Span, make_shift_plan
from lcdist.attention.shape import Shape, Traffic
from lcdist.attention.shared.plan_cache import cached_plan
from lcdist.exchange import Group, Interval, Pending, shift
from lcdist.layout import ContextLayout
from lcdist_kernels.common import document_starts
from lcdist_kernels.full import AttentionImpl, full_partial
from lcdist_kernels.scca import (
    HeadGroup,
    Part,
    Parts,
    Rule,
    banded_bwd,
    banded_fwd,
    dense_mask,
    head_groups,
    window_parts,
)

ALL = slice(None)


class GroupPlan(NamedTuple):
    """Exchange and work for one group of heads, seen from one rank.

    heads: the group's heads and rules.
    intervals: plan of the forward shift; empty if nothing travels.
    reversed_intervals: plan of the gradients' shift.
    send_ranges: local intervals of keys that this rank sends.
    received_ids: global numbers of the received keys.
    parts: what this rank's queries see of the received keys.
    """

    heads: HeadGroup
    intervals: tuple[Interval, ...]
    reversed_intervals: tuple[Interval, ...]
    send_ranges: list[Span]
    received_ids: Tensor
    parts: Parts


class WindowPlan(NamedTuple):
    """Work for the window rules of a rank's heads. Heads with other rules have no parts.

    local_parts: what this rank's queries see of its own keys.
    groups: the rest, by group of heads.
    """

    local_parts: Parts
    groups: list[GroupPlan]


@cached_plan
def make_window_plan(
    rules: tuple[Rule, ...],
    nheads_kv: int,
    key: LayoutKey,
    documents: Documents,
    block_impl: AttentionImpl,
) -> WindowPlan:
    """Plan the exchange and the work of the window rules among `rules`, one per query head."""
    layout = ContextLayout(*key[:3])
    token_ids = token_table("token_ids", key, None, CPU)
    starts = token_table("starts", key, documents, CPU)

    def parts(heads: HeadGroup, k_ids: Tensor, held: slice) -> list[Part]:
        return [
            part
            for members, rule in heads.members
            if rule.is_window
            for part in window_parts(
                rule, (heads.kv, held, members), token_ids, starts, k_ids, block_impl
            )
        ]

    local_parts, groups = [], []
    for heads in head_groups(rules, nheads_kv):
        plan = make_shift_plan(window_rules(heads), layout, documents)
        received_ids = plan.received_ids(key.rank)
        local_parts += parts(heads, token_ids, heads.kv)
        groups.append(
            GroupPlan(
                heads,
                plan.intervals,
                plan.reversed(),
                plan.send_ranges(key.rank),
                received_ids,
                Parts(parts(heads, received_ids, ALL) if plan.intervals else ()),
            )
        )
    return WindowPlan(Parts(local_parts), groups)


def window_rules(heads: HeadGroup) -> tuple[Rule, ...]:
    """Return the window rules of a group's heads."""
    return tuple(rule for _, rule in heads.members if rule.is_window)


def _post_keys(
    k: Tensor, v: Tensor, plan: WindowPlan, group: Group
) -> list[tuple[GroupPlan, Pending, Pending]]:
    """Post the shifts of all groups of heads for which something travels."""
    return [
        (
            part,
            shift(k[:, :, part.heads.kv], part.intervals, group),
            shift(v[:, :, part.heads.kv], part.intervals, group),
        )
        for part in plan.groups
        if part.intervals
    ]


@dataclass(frozen=True)
class ShiftedWindows:
    """Window rules over shifted keys, as `KeptPass` takes them; keeps what was received too.

    q `[b, s, h_kv, h / h_kv, d]`, rotated as k is. out is like q, 0 for heads without windows.
    """

    plan: WindowPlan
    block_impl: AttentionImpl
    ctx: AttentionContext

    def fwd(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Return out, lse, then the received keys and values."""
        pending, scale = _post_keys(k, v, self.plan, self.ctx.group), self.ctx.softmax_scale
        partial = banded_fwd(q, k, v, self.plan.local_parts, scale, impl=self.block_impl)
        received: list[Tensor] = []
        for part, pending_k, pending_v in pending:
            kv = pending_k.wait(), pending_v.wait()
            partial = banded_fwd(q, *kv, part.parts, scale, partial, impl=self.block_impl)
            received += kv
        return [partial[0].to(q.dtype), partial[1], *received]

    def bwd(
        self, dout: Tensor, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        (q, k, v), (out, lse, *received) = inputs, results
        plan, ctx = self.plan, self.ctx
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)

        def gradients(k: Tensor, v: Tensor, parts: list[Part]) -> tuple[Tensor, Tensor]:
            """Add the parts' share of dq; return their (dk, dv)."""
            return banded_bwd(
                dout,
                q,
                k,
                v,
                (out, lse),
                parts,
                dq,
                ctx.softmax_scale,
                impl=self.block_impl,
            )

        pending = []
        for part in plan.groups:
            if part.intervals:
                (k_received, v_received), received = received[:2], received[2:]
                grads = gradients(k_received, v_received, part.parts)
                pending.append(
                    (part, [shift(grad, part.reversed_intervals, ctx.group) for grad in grads])
                )
        dk, dv = gradients(k, v, plan.local_parts)
        for part, pair in pending:
            for grad, returned in zip((dk, dv), pair, strict=True):
                _add_returned(grad, returned.wait(), part)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _add_returned(grad: Tensor, returned: Tensor, part: GroupPlan) -> None:
    """Add the gradients that came back for the intervals that this rank had sent."""
    pieces = returned.split([stop - start for start, stop in part.send_ranges], 1)
    for (start, stop), piece in zip(part.send_ranges, pieces, strict=True):
        grad[:, start:stop, part.heads.kv].add_(piece)


def reference_windows(
    q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan, ctx: AttentionContext
) -> Tensor:
    """Compute window rules with dense maths on own and received keys, gradients by autograd.

    `ShiftedWindows` is tested against it.
    """
    token_ids, starts = ctx.token_ids(), ctx.starts()
    out = torch.zeros_like(q)
    pending = {id(part): (a, b) for part, a, b in _post_keys(k, v, plan, ctx.group)}
    for part in plan.groups:
        kv = part.heads.kv
        k_ids, k_group, v_group = token_ids, k[:, :, kv], v[:, :, kv]
        if id(part) in pending:
            pending_k, pending_v = pending[id(part)]
            k_group = torch.cat((k_group, pending_k.wait()), 1)
            v_group = torch.cat((v_group, pending_v.wait()), 1)
            k_ids = torch.cat((token_ids, part.received_ids))
        k_starts = document_starts(ctx.cu_seqlens, k_ids, ctx.layout.seqlen)
        for members, rule in part.heads.members:
            if rule.is_window:
                queries = q[:, :, kv, members]
                mask = dense_mask([rule], token_ids, starts, k_ids, k_starts)[0].to(q.device)
                rows, _ = full_partial(
                    queries.flatten(2, 3), k_group, v_group, mask, ctx.softmax_scale
                )
                out = out.clone()
                out[:, :, kv, members] = rows.to(q.dtype).view(queries.shape)
    return out


def shift_bytes(rules: Sequence[Rule], shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends for the window rules among `rules`, one per query head.

    Forward: the keys and values that other ranks see, of one document as long as the layout.
    Backward: the gradients of received ones, in the wider of fp32 and their dtype.
    """
    forward, backward = [0] * layout.cp_size, [0] * layout.cp_size
    for heads in head_groups(rules, shape.nheads_kv):
        num_heads = len(range(shape.nheads_kv)[heads.kv])
        elements = 2 * shape.batch * num_heads * shape.head_dim
        for src, dst, start, stop in make_shift_plan(window_rules(heads), layout).intervals:
            forward[src] += (stop - start) * elements * shape.itemsize
            backward[dst] += (stop - start) * elements * max(4, shape.itemsize)
    return Traffic(tuple(forward), tuple(backward))

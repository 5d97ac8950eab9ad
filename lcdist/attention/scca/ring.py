"""Key-residue dilation under context parallelism: a ring of only the keys that some head reads.

Under `sda_key` all queries of a head read only the keys at j = s (mod r) of their document. So each
key head sends around only the residues that its query heads read: 1 / r of the keys if they share a
shift (arXiv:2312.07305). All blocks have as many rows as the longest; the rest is padding that no
query sees. Keys and values travel in their own dtype, gradients in the wider of it and fp32.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.attention.context import CPU, AttentionContext, LayoutKey, token_table
from lcdist.attention.scca.shift_plan import Documents
from lcdist.attention.scca.units import count_of_residue
from lcdist.attention.shape import Shape, Traffic
from lcdist.attention.shared.plan_cache import cached_plan
from lcdist.exchange import ring, ring_with_gradients
from lcdist.layout import ContextLayout
from lcdist_kernels.common import wide_dtype
from lcdist_kernels.full import AttentionImpl, full_partial, merge, reaches, visible
from lcdist_kernels.scca import Part, Parts, Rule, banded_bwd, banded_fwd, head_groups

ALL = slice(None)


class KeyStream(NamedTuple):
    """Key heads of which one residue travels.

    kv: the key heads.
    members: the query heads of each key head that read this residue.
    block_heads: position of these heads in the block.
    shift: the residue.
    """

    kv: slice
    members: slice
    block_heads: slice
    shift: int


class KeyRingPlan(NamedTuple):
    """The blocks of a ring of keys, and one rank's work on each.

    streams: in the order in which a block holds them.
    num_rows: rows of a block, padding included.
    own_tokens: by shift, the local numbers of this rank's tokens, at most `num_rows`.
    key_ids: by owner and shift, the global numbers of the block's rows; seqlen for padding.
    parts: by owner, what this rank's queries see of the block.
    """

    streams: list[KeyStream]
    num_rows: int
    own_tokens: dict[int, Tensor]
    key_ids: list[dict[int, Tensor]]
    parts: list[Parts]

    def block(self, k: Tensor, v: Tensor) -> Tensor:
        """Return what this rank sends: `[2, b, num_rows, heads, d]`, differentiable."""
        parts = []
        for stream in self.streams:
            tokens = self.own_tokens[stream.shift]
            kv = torch.stack([x[:, :, stream.kv].index_select(1, tokens) for x in (k, v)])
            padding = kv.new_zeros(*kv.shape[:2], self.num_rows - len(tokens), *kv.shape[3:])
            parts.append(torch.cat((kv, padding), 2))
        return torch.cat(parts, 3)

    def block_bwd(self, dblock: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return (dk, dv), like k, from the gradient of the block."""
        grad = torch.zeros((2, *k.shape), dtype=dblock.dtype, device=k.device)
        for stream in self.streams:
            tokens = self.own_tokens[stream.shift]
            rows = dblock[:, :, : len(tokens), stream.block_heads]
            grad[:, :, :, stream.kv].index_add_(2, tokens, rows)
        dk, dv = grad.to(k.dtype)
        return dk, dv


@cached_plan
def make_key_ring_plan(
    rules: tuple[Rule, ...],
    nheads_kv: int,
    key: LayoutKey,
    documents: Documents,
    device: torch.device,
) -> KeyRingPlan:
    """Plan the ring of keys for key rules of one dilation, one rule per query head."""
    streams = _key_streams(rules, nheads_kv)
    shifts = sorted({stream.shift for stream in streams})
    residues = [_residues(key, rank, documents, rules[0].size) for rank in range(key.cp_size)]
    num_rows = _rows_per_block(residues, shifts, rules[0].size)
    own_tokens = {
        shift: (residues[key.rank] == shift).nonzero().flatten().to(device) for shift in shifts
    }
    token_ids = token_table("token_ids", key, None, CPU)
    starts = token_table("starts", key, documents, CPU)
    key_ids, parts = [], []
    for owner in range(key.cp_size):
        owner_ids = token_table("token_ids", key._replace(rank=owner), None, CPU)
        by_shift = {}
        for shift in shifts:
            ids = owner_ids[residues[owner] == shift]
            by_shift[shift] = torch.cat((ids, ids.new_full((num_rows - len(ids),), key.seqlen)))
        key_ids.append(by_shift)
        bands = [(stream, (token_ids, starts, by_shift[stream.shift])) for stream in streams]
        parts.append(
            Parts(
                Part(ALL, ALL, stream.kv, stream.block_heads, stream.members, *band)
                for stream, band in bands
                if num_rows and reaches(*band)
            )
        )
    return KeyRingPlan(streams, num_rows, own_tokens, key_ids, parts)


def _key_streams(rules: Sequence[Rule], nheads_kv: int) -> list[KeyStream]:
    streams, num_heads = [], 0
    for heads in head_groups(rules, nheads_kv):
        size = len(range(heads.kv.start, heads.kv.stop, heads.kv.step))
        for members, rule in heads.members:
            block_heads = slice(num_heads, num_heads + size)
            streams.append(KeyStream(heads.kv, members, block_heads, rule.shift))
            num_heads += size
    return streams


def _residues(key: LayoutKey, rank: int, documents: Documents, dilation: int) -> Tensor:
    """Return the residue, inside its document, of each of a rank's tokens."""
    return token_table("positions", key._replace(rank=rank), documents, CPU) % dilation


def _rows_per_block(residues: Iterable[Tensor], shifts: Iterable[int], dilation: int) -> int:
    """Return the most tokens of any of the residues `shifts` on any rank."""
    counts = [residue.bincount(minlength=dilation) for residue in residues]
    return max(int(count[shift]) for count in counts for shift in shifts)


@dataclass(frozen=True)
class RingKeys:
    """One lap forward, one backward, as `KeptPass` takes it. q `[b, s, h_kv, h / h_kv, d]`."""

    plan: KeyRingPlan
    block_impl: AttentionImpl
    ctx: AttentionContext

    def fwd(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse) over all ranks' keys, out in q's dtype."""
        scale = self.ctx.softmax_scale
        partial = banded_fwd(q, k, v, Parts(), scale)
        for owner, (k_blk, v_blk) in ring(self.plan.block(k, v), self.ctx.group):
            parts = self.plan.parts[owner]
            partial = banded_fwd(q, k_blk, v_blk, parts, scale, partial, impl=self.block_impl)
        return partial[0].to(q.dtype), partial[1]

    def bwd(
        self, dout: Tensor, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        (q, k, v), (out, lse), plan = inputs, results, self.plan
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        lap = ring_with_gradients(plan.block(k, v), self.ctx.group)
        for visit in lap:
            k_blk, v_blk = visit.block
            grads = banded_bwd(
                dout,
                q,
                k_blk,
                v_blk,
                (out, lse),
                plan.parts[visit.owner],
                dq,
                self.ctx.softmax_scale,
                impl=self.block_impl,
            )
            visit.add_gradient(torch.stack(grads))
        return dq.to(q.dtype), *plan.block_bwd(lap.result(), k)


def reference_keys(
    q: Tensor, k: Tensor, v: Tensor, plan: KeyRingPlan, ctx: AttentionContext
) -> Tensor:
    """Compute key rules with dense maths on every block, gradients by autograd.

    `RingKeys` is tested against it.
    """
    token_ids, starts = ctx.token_ids(), ctx.starts()
    q = q.to(wide_dtype(q.dtype))
    partials: list[tuple[Tensor, Tensor] | None] = [None] * len(plan.streams)
    for owner, (k_blk, v_blk) in ring(plan.block(k, v), ctx.group):
        for i, stream in enumerate(plan.streams):
            mask = visible(token_ids, starts, plan.key_ids[owner][stream.shift]).to(q.device)
            queries = q[:, :, stream.kv, stream.members].flatten(2, 3)
            k_heads, v_heads = k_blk[:, :, stream.block_heads], v_blk[:, :, stream.block_heads]
            part = full_partial(queries, k_heads, v_heads, mask, ctx.softmax_scale)
            earlier = partials[i]
            partials[i] = part if earlier is None else merge(*earlier, *part)
    out = torch.zeros_like(q)
    for stream, partial in zip(plan.streams, partials, strict=True):
        assert partial is not None
        out = out.clone()
        rows = out[:, :, stream.kv, stream.members]
        rows.copy_(partial[0].view(rows.shape))
    return out


def ring_key_bytes(rules: Sequence[Rule], shape: Shape, layout: ContextLayout) -> Traffic:
    """Count the bytes that each rank sends for key rules, one per query head; 0 for other rules.

    Forward: cp - 1 hops of the block. Backward: the same again, and cp hops of its gradient in the
    wider of fp32 and its dtype. Assumes one document as long as the layout.
    """
    cp = layout.cp_size
    if cp == 1 or rules[0].kind != "key":
        return Traffic((0,) * cp, (0,) * cp)
    streams, dilation = _key_streams(rules, shape.nheads_kv), rules[0].size
    shifts = {stream.shift for stream in streams}
    num_rows = max(
        count_of_residue(layout.spans(rank), shift, dilation)
        for rank in range(cp)
        for shift in shifts
    )
    num_heads = streams[-1].block_heads.stop
    elements = 2 * shape.batch * num_rows * num_heads * shape.head_dim
    forward = (cp - 1) * elements * shape.itemsize
    backward = forward + cp * elements * max(4, shape.itemsize)
    return Traffic((forward,) * cp, (backward,) * cp)

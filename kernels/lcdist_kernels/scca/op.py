"""Shifted cross chunk attention as a differentiable torch function.

"triton": full attention's kernels over a work table, all parts in one launch. "torch": the tiled
implementation, part by part. "reference": the dense one. "auto": the kernels on CUDA, tiled torch
on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lcdist_kernels.common import (
    check_impl,
    check_qkv,
    check_self,
    document_borders,
    resolve_scale,
)
from lcdist_kernels.full import AttentionImpl, full_fwd, select_impl
from lcdist_kernels.full.impl import TRITON_IMPL
from lcdist_kernels.full.piece_kernel import launches_for
from lcdist_kernels.rotary import Rotary, rotate_self
from lcdist_kernels.scca.pieces import PiecesFunction
from lcdist_kernels.scca.reference import check_rules, scca_reference
from lcdist_kernels.scca.rules import Rule, head_groups
from lcdist_kernels.scca.tiled import Part, banded_bwd, banded_fwd, self_parts
from lcdist_kernels.tape import KeptPass
from lcdist_kernels.tile_ranges import device_stream

IMPLS = ("auto", "triton", "torch", "reference")


@dataclass(frozen=True)
class BandedPass:
    """Attention by parts over q `[b, s, h_kv, h / h_kv, d]`, as `KeptPass` takes it."""

    parts: Sequence[Part]
    scale: float
    impl: AttentionImpl

    def fwd(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return (out, lse), out in q's dtype."""
        out, lse = banded_fwd(q, k, v, self.parts, self.scale, impl=self.impl)
        return out.to(q.dtype), lse

    def bwd(
        self, dout: Tensor, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of q, k and v."""
        (q, k, v), (out, lse) = inputs, results
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        dk, dv = banded_bwd(dout, q, k, v, (out, lse), self.parts, dq, self.scale, impl=self.impl)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def scca_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    rules: Sequence[Rule], rotary: Rotary | None = None, positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None, softmax_scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        impl: one of `IMPLS`.
        other: as in `scca_reference`.

    Raises:
        ValueError: as `scca_reference`; also an unknown `impl`, or tensors that kernels do not
            take.
    """
    check_impl(impl, "scca", IMPLS)
    if impl == "reference":
        return scca_reference(
            q, k, v, rules=rules, rotary=rotary, positions=positions, cu_seqlens=cu_seqlens,
            softmax_scale=softmax_scale,
        )  # fmt: skip
    check_self(q, k, v)
    check_rules(rules, q.shape[2])
    implementation = select_impl(impl, q, "scca attention")
    q, k, _, starts = rotate_self(q, k, rotary, positions, cu_seqlens)
    scale = resolve_scale(softmax_scale, q.shape[3])
    if implementation is TRITON_IMPL and q.numel():
        documents = document_borders(cu_seqlens, q.shape[1])
        launches = launches_for(q, k, v)
        plan = (tuple(rules), k.shape[2], q.shape[1], documents, launches, device_stream(q))
        return PiecesFunction.apply(q, k, v, plan, scale)
    parts = self_parts(head_groups(rules, k.shape[2]), starts, implementation)
    grouped = q.unflatten(2, (k.shape[2], -1))
    return KeptPass.apply(BandedPass(parts, scale, implementation), grouped, k, v).flatten(2, 3)


@torch.no_grad()
def scca_cached(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *,
    rules: Sequence[Rule], rotary: Rotary | None = None, softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return attention of new tokens over a cache, shaped like q; without gradients.

    q `[b, n, h, d]` at `positions` `[n]`; k, v: entries of positions 0, 1, ... Only keys that a
    rule shows are read.
    """
    check_qkv(q, k, v)
    check_rules(rules, q.shape[2])
    scale = resolve_scale(softmax_scale, q.shape[3])
    index = torch.arange(k.shape[1])
    queries = q if rotary is None else rotary.rotate(q, positions)
    queries = queries.unflatten(2, (k.shape[2], -1))
    out = torch.zeros_like(queries)
    for group in head_groups(rules, k.shape[2]):
        for members, rule in group.members:
            first, last = rule.limits(positions)
            for rows, keys in _cache_reads(rule, positions, first, last):
                if not len(index[keys]) or not len(rows):
                    continue
                part_k = k[:, keys, group.kv]
                if rotary is not None:
                    part_k = rotary.rotate(part_k, index[keys])
                part, _ = full_fwd(
                    queries[:, rows, group.kv, members].flatten(2, 3), part_k, v[:, keys, group.kv],
                    last[rows], first[rows], index[keys], scale,
                )  # fmt: skip
                heads = out[:, :, group.kv, members]
                heads[:, rows] = part.to(q.dtype).view(heads[:, rows].shape)
    return out.flatten(2, 3)


def _cache_reads(
    rule: Rule, positions: Tensor, first: Tensor, last: Tensor
) -> list[tuple[Tensor, slice]]:
    """Return (rows, keys): which new rows read which slice of the cache."""
    all_rows = torch.arange(len(positions))
    if rule.kind == "key":
        return [(all_rows, slice(rule.shift, None, rule.size))]
    if rule.kind == "pair":
        residue = positions % rule.size
        return [
            (all_rows[residue == r], slice((r - rule.shift) % rule.size, None, rule.size))
            for r in residue.unique().tolist()
        ]
    nonempty = first <= last
    if not nonempty.any():
        return []
    return [(all_rows, slice(int(first[nonempty].min()), int(last[nonempty].max()) + 1))]

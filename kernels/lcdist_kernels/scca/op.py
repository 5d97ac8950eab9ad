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
    check_self,
    document_borders,
    resolve_scale,
)
from lcdist_kernels.full import AttentionImpl, select_impl
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

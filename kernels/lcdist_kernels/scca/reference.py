"""Shifted cross chunk attention and its relatives, dense and readable: the truth for the others.

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j   over the keys that the rule shows

(`rules` has the rules, one a head; arXiv:2312.07305). A query that sees no key has out = 0. Heads
are independent: what they see together is what the paper accumulates over heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lcdist_kernels.common import check_self, document_starts
from lcdist_kernels.full.reference import full_partial
from lcdist_kernels.rotary import Rotary
from lcdist_kernels.scca.rules import KINDS, Rule, dense_mask


def scca_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    rules: Sequence[Rule], rotary: Rotary | None = None, positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None, softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, un-rotated; out is like q.

    rules: one a query head; chunks, shifts and residues count from the start of a document.
    positions: integers `[s]` or `[b, s]`, used by rotary alone; default: from 0 in every document.
    cu_seqlens: see `document_starts`. softmax_scale: default head_dim ** -0.5. Any float dtype;
    sums in the wider of fp32 and q.dtype. Raises ValueError where shapes or rules do not fit.
    """
    check_self(q, k, v)
    check_rules(rules, q.shape[2])
    index = torch.arange(q.shape[1])
    starts = document_starts(cu_seqlens, index, q.shape[1])
    if rotary is not None:
        positions = index - starts if positions is None else positions
        q, k = rotary.rotate(q, positions), rotary.rotate(k, positions)
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    mask = dense_mask(rules, index, starts, index, starts).to(q.device)
    return full_partial(q, k, v, mask, scale)[0].to(q.dtype)


def check_rules(rules: Sequence[Rule], nheads: int) -> None:
    """Raises ValueError unless there is one legal rule a query head."""
    if len(rules) != nheads:
        raise ValueError(f"{len(rules)} rules for {nheads} query heads: expected one a head")
    for rule in rules:
        if rule.kind not in KINDS or rule.size < 1 or rule.shift < 0:
            raise ValueError(
                f"{rule}: kind must be one of {', '.join(KINDS)}, size >= 1 and shift >= 0"
            )
        if rule.kind == "fold" and rule.shift % rule.size:
            raise ValueError(f"{rule}: a folded shift must be a multiple of size")
        if not rule.is_window and rule.shift >= rule.size:
            raise ValueError(f"{rule}: the shift must be a residue, below size")

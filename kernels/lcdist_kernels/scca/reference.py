"""Shifted cross chunk attention, dense and readable: the reference of the others.

    out_i = sum_j softmax_j(softmax_scale * q_i . k_j) v_j   over the keys that the rule shows

(`rules` defines the rules, one per head; arXiv:2312.07305). A query that sees no key has out = 0.
Heads are independent; the paper's accumulation over heads is the union of what they see.
"""

from collections.abc import Sequence

from torch import Tensor

from lcdist_kernels.common import check_self, resolve_scale
from lcdist_kernels.full.reference import full_partial
from lcdist_kernels.rotary import Rotary, rotate_self
from lcdist_kernels.scca.rules import KINDS, Rule, dense_mask


def scca_reference(
    q: Tensor, k: Tensor, v: Tensor, *,
    rules: Sequence[Rule], rotary: Rotary | None = None, positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None, softmax_scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Return attention of q `[b, s, h, d]` over k, v `[b, s, h_kv, d]`, shaped like q.

    Args:
        q, k, v: not rotated; any float dtype. Sums are in the wider of fp32 and q.dtype.
        rules: one per query head; chunks, shifts and residues count from the start of a document.
        positions: integers `[s]` or `[b, s]`, used by rotary only; default: from 0 in every
            document.
        cu_seqlens: see `document_starts`.
        softmax_scale: default head_dim ** -0.5.

    Raises:
        ValueError: shapes or rules do not fit.
    """
    check_self(q, k, v)
    check_rules(rules, q.shape[2])
    q, k, index, starts = rotate_self(q, k, rotary, positions, cu_seqlens)
    scale = resolve_scale(softmax_scale, q.shape[3])
    mask = dense_mask(rules, index, starts, index, starts).to(q.device)
    return full_partial(q, k, v, mask, scale)[0].to(q.dtype)


def check_rules(rules: Sequence[Rule], nheads: int) -> None:
    """Raise ValueError unless there is one legal rule per query head."""
    if len(rules) != nheads:
        raise ValueError(f"{len(rules)} rules for {nheads} query heads: expected one per head")
    for rule in rules:
        if rule.kind not in KINDS or rule.size < 1 or rule.shift < 0:
            raise ValueError(
                f"{rule}: kind must be one of {', '.join(KINDS)}, size >= 1 and shift >= 0"
            )
        if rule.kind == "fold" and rule.shift % rule.size:
            raise ValueError(f"{rule}: a folded shift must be a multiple of size")
        if not rule.is_window and rule.shift >= rule.size:
            raise ValueError(f"{rule}: the shift must be a residue, below size")

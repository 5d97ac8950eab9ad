"""Attention of a block by a library, in the form of `tiled.full_fwd` and `tiled.full_bwd`.

A library knows two masks, none and causal. Without documents each block of a ring has one of them
once rows and keys that see nothing are cut off:

    layout        own block   earlier owner's block        later owner's block
    contiguous    causal      whole                        none
    zigzag        causal      whole: all rows, first       whole: last half of the rows, all keys
                              half of the keys
    striped       causal      causal                       causal: rows from the second on, keys
                                                           without the last

Any other block, as of packed documents, goes to another implementation.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from lcdist_kernels.common import positive_scale
from lcdist_kernels.full.library import Library
from lcdist_kernels.tile_ranges import TABLES_KEPT, Band, band_of, bounded_below

# Fewer rows or keys are no work for a library, and some refuse a single token.
LEAST_ROWS = 16


class Cut(NamedTuple):
    """Rows from `first` on and the first `keys` keys, under a causal mask or none.

    Rows before `first` see nothing, and nobody sees later keys.
    """

    first: int
    keys: int
    causal: bool


@lru_cache(maxsize=TABLES_KEPT)
def cut_of(band: Band) -> Cut | None:
    """Return the part of a block that is whole or causal if the rest is hidden; else None."""
    in_order = band.q_idx.sorted() and band.k_idx.sorted()
    if not in_order or bounded_below(band):
        return None
    seen = torch.searchsorted(band.k_idx.values, band.q_idx.values, right=True)
    first = int((seen == 0).sum())
    seen = seen[first:]
    if len(seen) < LEAST_ROWS:
        return None
    if seen[0] == seen[-1] and seen[0] >= LEAST_ROWS:
        return Cut(first, int(seen[0]), False)
    if torch.equal(seen, torch.arange(1, len(seen) + 1)):
        return Cut(first, len(seen), True)
    return None


class LibraryBlock(NamedTuple):
    """The two functions of an `AttentionImpl`.

    Attributes:
        library: computes whole and causal blocks.
        other_fwd, other_bwd: compute all other blocks.
    """

    library: Library
    other_fwd: Callable[..., tuple[Tensor, Tensor]]
    other_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def fwd(
        self, q: Tensor, k: Tensor, v: Tensor, q_idx: Tensor, q_lo: Tensor, k_idx: Tensor,
        softmax_scale: float, *,
        out_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the partial (out, lse) of q over a block of keys: see `tiled.full_fwd`.

        A library rounds out to q.dtype; without `out_dtype` it stays so, as wider numbers would be
        the same and twice the bytes. `merge` makes its results fp32.
        """
        cut = cut_of(band_of(q_idx, q_lo, k_idx))
        if cut is None:
            band = (q_idx, q_lo, k_idx)
            return self.other_fwd(q, k, v, *band, softmax_scale, out_dtype=out_dtype)
        first, keys, causal = cut
        q, softmax_scale = positive_scale(q, softmax_scale)
        out, lse = self.library.fwd(q[:, first:], k[:, :keys], v[:, :keys], causal, softmax_scale)
        dtype = out_dtype or out.dtype
        if not first:
            return out.to(dtype), lse
        every_lse = lse.new_full((*lse.shape[:2], q.shape[1]), -torch.inf)
        every_lse[..., first:] = lse
        return _rows_of(out, first, q.shape, dtype), every_lse

    def bwd(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        q_idx: Tensor, q_lo: Tensor, k_idx: Tensor, softmax_scale: float, *,
        grad_dtype: torch.dtype | None = None, dq_sum: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the share of (dq, dk, dv) of a block of keys: see `tiled.full_bwd`.

        Without `grad_dtype` in the library's dtype, as out in `fwd`.
        """
        cut = cut_of(band_of(q_idx, q_lo, k_idx))
        if cut is None:
            rest = (out, lse, q_idx, q_lo, k_idx, softmax_scale)
            return self.other_bwd(dout, q, k, v, *rest, grad_dtype=grad_dtype, dq_sum=dq_sum)
        first, keys, causal = cut
        dq, dk, dv = self.library.bwd(
            dout[:, first:].to(q.dtype), q[:, first:], k[:, :keys], v[:, :keys],
            out[:, first:].to(q.dtype), lse[..., first:], causal, softmax_scale,
        )  # fmt: skip
        dtype = grad_dtype or dq.dtype
        if dq_sum is None:
            dq_sum = _rows_of(dq, first, q.shape, dtype)
        else:
            dq_sum[:, first:].add_(dq)
        return (
            dq_sum,
            _rows_of(dk, 0, k.shape, dtype),
            _rows_of(dv, 0, v.shape, dtype),
        )


def _rows_of(x: Tensor, first: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return x `[b, rows, h, d]` in a dtype as rows from `first` on of a shape, 0 elsewhere."""
    if x.shape == shape:
        return x.to(dtype)
    whole = x.new_zeros(shape, dtype=dtype)
    whole[:, first : first + x.shape[1]] = x
    return whole


def refuse_block(name: str) -> Callable[..., NoReturn]:
    """Return a function that raises ValueError for a block that a forced library cannot compute."""

    def refuse(*tensors: object, **options: object) -> NoReturn:
        raise ValueError(
            f"impl = '{name}': a library computes whole and causal blocks, and this block is of "
            "packed documents or too short; use impl = 'auto' or 'triton'"
        )

    return refuse

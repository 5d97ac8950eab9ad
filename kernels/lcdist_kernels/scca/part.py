"""A part of banded attention: some queries of some heads over some keys."""

from typing import NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """Some queries of some heads over some keys: q_lo <= k_idx <= q_hi is visible.

    Attributes:
        rows, keys: slices of the query and key tokens.
        kv: slice of q's groups of heads. k_heads: the same heads in k and v.
        members: slice of the query heads of each group.
        q_hi, q_lo, k_idx: int64 on the CPU, for rows and keys.
    """

    rows: slice
    keys: slice
    kv: slice
    k_heads: slice
    members: slice
    q_hi: Tensor
    q_lo: Tensor
    k_idx: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """Return `[b, rows, heads, d]` of x `[b, s, h_kv, h / h_kv, d]`."""
        return x[:, self.rows, self.kv, self.members].flatten(2, 3)

    def row_numbers(self, x: Tensor) -> Tensor:
        """Return `[b, heads, rows]` of x `[b, h_kv, h / h_kv, s]`."""
        return x[:, self.kv, self.members, self.rows].flatten(1, 2)

    @property
    def band(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the arguments of `full_fwd` that say which keys are visible."""
        return self.q_hi, self.q_lo, self.k_idx

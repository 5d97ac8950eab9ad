"""Describe the order of heads in the output of Megatron's fused projection."""

from typing import NamedTuple

from torch import Tensor


class QkvShape(NamedTuple):
    """Heads of one rank: every key head's group is r query heads, then its key, then its value.

    Attributes:
        nheads_kv: key heads.
        group: query heads of a key head, r.
        head_dim: features of a head, d.
    """

    nheads_kv: int
    group: int
    head_dim: int

    def parts(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return views of q `[s, b, h_kv, r, d]` and of k and v `[s, b, h_kv, 1, d]`.

        mixed: `[s, b, h_kv * (r + 2) * d]`. Raises ValueError for another width.
        """
        width = self.nheads_kv * (self.group + 2) * self.head_dim
        if mixed.dim() != 3 or mixed.shape[2] != width:
            raise ValueError(f"mixed of shape {tuple(mixed.shape)}: expected [s, b, {width}]")
        heads = mixed.unflatten(2, (self.nheads_kv, self.group + 2, self.head_dim))
        q, k, v = heads.split([self.group, 1, 1], 3)
        return q, k, v

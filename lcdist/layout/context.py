"""Who holds which token: the one place where a sequence is cut over context-parallel ranks.

Three kinds of cut, for `cp_size` ranks:

- contiguous: rank r holds the r-th of cp equal pieces;
- zigzag: the sequence is cut into 2 cp pieces, rank r holds pieces r and 2 cp - 1 - r, so that
  causal attention costs every rank the same;
- striped: rank r holds tokens r, r + cp, r + 2 cp, ... (striped attention, arXiv:2311.09431).

Masks and rotary angles are computed from `positions`, never from `rank * chunk`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

KINDS = ("contiguous", "zigzag", "striped")


def pieces_needed(kind: str, cp_size: int) -> int:
    """What a sequence length must be a multiple of for `kind` to cut it over `cp_size` ranks."""
    if kind not in KINDS:
        raise ValueError(f"layout kind {kind!r}: must be one of {', '.join(KINDS)}")
    return 2 * cp_size if kind == "zigzag" and cp_size > 1 else cp_size


@dataclass(frozen=True)
class ContextLayout:
    """The cut of a sequence of `seqlen` tokens over `cp_size` ranks.

    kind: one of `KINDS`. seqlen: global length in tokens, after padding. multiple_of: a further
    divisor of seqlen that the attention method asks for.

    Raises ValueError where seqlen does not fit; nothing is ever rounded here.
    """

    kind: str
    seqlen: int
    cp_size: int
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.cp_size < 1 or self.multiple_of < 1:
            raise ValueError(
                f"cp_size = {self.cp_size}, multiple_of = {self.multiple_of}: both must be >= 1"
            )
        step = lcm(pieces_needed(self.kind, self.cp_size), self.multiple_of)
        if self.seqlen < 1 or self.seqlen % step:
            raise ValueError(
                f"seqlen = {self.seqlen} does not fit a {self.kind} layout on cp_size = "
                f"{self.cp_size}: it must be a positive multiple of {step}; "
                f"the next one is {max(1, -(-self.seqlen // step)) * step}"
            )

    @property
    def local_seqlen(self) -> int:
        """Tokens each rank holds; the same on all ranks."""
        return self.seqlen // self.cp_size

    def positions(self, rank: int) -> Tensor:
        """The global position of each token of `rank`, in local order: int64 `[local_seqlen]`.

        Increasing for every kind, on the CPU.
        """
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"rank {rank}: must be in 0..{self.cp_size - 1}")
        cp, local = self.cp_size, self.local_seqlen
        if cp == 1:
            return torch.arange(self.seqlen)
        if self.kind == "striped":
            return torch.arange(rank, self.seqlen, cp)
        if self.kind == "contiguous":
            return torch.arange(rank * local, (rank + 1) * local)
        piece = local // 2
        mirror = 2 * cp - 1 - rank
        return torch.cat(
            [
                torch.arange(rank * piece, (rank + 1) * piece),
                torch.arange(mirror * piece, (mirror + 1) * piece),
            ]
        )

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """`rank`'s part of `x`, whose `dim` has seqlen entries. Raises ValueError otherwise."""
        if x.shape[dim] != self.seqlen:
            raise ValueError(
                f"dim {dim} of a tensor of shape {tuple(x.shape)} has {x.shape[dim]} entries; "
                f"this layout cuts {self.seqlen}"
            )
        return x.index_select(dim, self.positions(rank).to(x.device))

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The whole tensor from all ranks' parts, in rank order: the inverse of `shard`."""
        if len(shards) != self.cp_size:
            raise ValueError(f"{len(shards)} shards for cp_size = {self.cp_size}")
        order = torch.cat([self.positions(rank) for rank in range(self.cp_size)])
        whole = torch.cat(list(shards), dim)
        if whole.shape[dim] != self.seqlen:
            raise ValueError(f"the shards hold {whole.shape[dim]} entries, not {self.seqlen}")
        return whole.index_select(dim, order.argsort().to(whole.device))

    def local_cu_seqlens(self, cu_seqlens: Tensor, rank: int) -> Tensor:
        """Document borders in `rank`'s local token order: int32, as long as `cu_seqlens`.

        Entry i counts the local tokens that come before global position cu_seqlens[i], so
        document i keeps its number and is empty where the rank holds none of it.
        """
        borders = cu_seqlens.to("cpu", torch.int64)
        return torch.searchsorted(self.positions(rank), borders).to(cu_seqlens)

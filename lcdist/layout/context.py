"""Layout of a sequence's tokens on context-parallel ranks.

Three kinds, for `cp_size` ranks:

- contiguous: rank r holds the r-th of cp equal pieces;
- zigzag: the sequence is split into 2 cp pieces, and rank r holds pieces r and 2 cp - 1 - r, so
  that causal attention costs every rank the same;
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
    """Return the number that a sequence length must be a multiple of for this kind of layout."""
    if kind not in KINDS:
        raise ValueError(f"layout kind {kind!r}: must be one of {', '.join(KINDS)}")
    return 2 * cp_size if kind == "zigzag" and cp_size > 1 else cp_size


@dataclass(frozen=True)
class ContextLayout:
    """Layout of a sequence of `seqlen` tokens on `cp_size` ranks.

    Attributes:
        kind: One of `KINDS`.
        seqlen: Global length in tokens, after padding.
        cp_size: Number of ranks.
        multiple_of: A further divisor of seqlen, which the attention method needs.

    Raises:
        ValueError: If seqlen is not a multiple; the length is never rounded here.
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
        """Tokens on each rank; equal on all ranks."""
        return self.seqlen // self.cp_size

    def positions(self, rank: int) -> Tensor:
        """Return the global position of each token of `rank`: int64 `[local_seqlen]`, on the CPU.

        Positions increase for every kind.
        """
        if not 0 <= rank < self.cp_size:
            raise ValueError(f"rank {rank}: must be in 0..{self.cp_size - 1}")
        if self.kind == "striped":
            return torch.arange(rank, self.seqlen, self.cp_size)
        return torch.cat([torch.arange(*span) for span in self.spans(rank)])

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """Return the positions of `rank` as increasing intervals [start, stop); not for striped."""
        assert self.kind != "striped" or self.cp_size == 1, "a stripe has no intervals"
        cp, local = self.cp_size, self.local_seqlen
        if self.kind != "zigzag" or cp == 1 or rank == cp - 1:
            # The last rank of zigzag holds the two pieces in the middle.
            start = (self.seqlen - local) // 2 if self.kind == "zigzag" else rank * local
            return [(start, start + local)]
        piece, mirror = local // 2, 2 * cp - 1 - rank
        return [(rank * piece, (rank + 1) * piece), (mirror * piece, (mirror + 1) * piece)]

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """Return `rank`'s part of `x`; raise ValueError if `dim` does not have seqlen entries."""
        if x.shape[dim] != self.seqlen:
            raise ValueError(
                f"dim {dim} of a tensor of shape {tuple(x.shape)} has {x.shape[dim]} entries; "
                f"this layout splits {self.seqlen}"
            )
        return x.index_select(dim, self.positions(rank).to(x.device))

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """Return the whole tensor from all ranks' parts, in rank order: inverse of `shard`."""
        if len(shards) != self.cp_size:
            raise ValueError(f"{len(shards)} shards: expected cp_size = {self.cp_size}")
        order = torch.cat([self.positions(rank) for rank in range(self.cp_size)])
        whole = torch.cat(list(shards), dim)
        if whole.shape[dim] != self.seqlen:
            raise ValueError(f"the shards have {whole.shape[dim]} entries: expected {self.seqlen}")
        return whole.index_select(dim, order.argsort().to(whole.device))

    def local_cu_seqlens(self, cu_seqlens: Tensor, rank: int) -> Tensor:
        """Return document borders in `rank`'s local token order: as long as `cu_seqlens`.

        Entry i counts the local tokens before global position cu_seqlens[i]. A document keeps its
        number; it is empty on a rank without any of its tokens.

        Args:
            cu_seqlens: Global borders, `[documents + 1]`; the result has its dtype and device.
            rank: Context-parallel rank.
        """
        borders = cu_seqlens.to("cpu", torch.int64)
        return torch.searchsorted(self.positions(rank), borders).to(cu_seqlens)

"""Plain records that every attention method shares: head numbers, sizes for counting, traffic."""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class HeadSlice:
    """Position of a tensor's heads among the heads of the whole model.

    Head patterns follow these numbers, so that tensor parallelism does not change the function.

    Attributes:
        first: number of the first query head that the tensor holds.
        nheads: query heads of the whole model.
        first_kv: number of the first key and value head that the tensor holds.
        nheads_kv: key and value heads of the whole model.
    """

    first: int
    nheads: int
    first_kv: int
    nheads_kv: int

    @classmethod
    def of_rank(cls, nheads: int, nheads_kv: int, rank: int, ranks: int) -> "HeadSlice":
        """Return the heads of one of some tensor-parallel ranks."""
        first = rank * (nheads // ranks)
        # With fewer key/value heads than ranks, neighbouring ranks hold the same head.
        return cls(first, nheads, first * nheads_kv // nheads, nheads_kv)


@dataclass(frozen=True)
class Shape:
    """Sizes of one layer's attention on one rank, for counting operations and bytes.

    Attributes:
        batch: sequences in a micro-batch.
        nheads, nheads_kv: heads that this rank holds.
        head_dim: features per head.
        itemsize: bytes per element of q, k and v.
        seqlen: global length in tokens; only `flops` needs it, because `bytes` takes a layout.
        heads: position of these heads in the model; None if the rank holds all heads.
    """

    batch: int
    nheads: int
    nheads_kv: int
    head_dim: int
    itemsize: int
    seqlen: int | None = None
    heads: HeadSlice | None = None


class Traffic(NamedTuple):
    """Bytes that each rank sends in one layer, one entry per rank."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]

"""One rank of a group alone: what its peers would send is zeros."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lcdist.exchange.virtual import VirtualRank


class _Zeros:
    """Messages that never come; the wait fills their buffers with zeros."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._buffers = buffers

    def wait(self) -> None:
        for buffer in self._buffers:
            buffer.zero_()


class LoneRank(VirtualRank):
    """Rank `rank` of `size` without its peers; accepted wherever a process group is.

    It shows what kernels a rank launches, not what they compute.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def size(self) -> int:
        """Return the number of ranks in the group."""
        return self._size

    def post(self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]) -> Any:
        """Send nothing; the wait fills the buffers of `recvs` with zeros."""
        return _Zeros([buffer for _, buffer in recvs])

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return this rank's object in place of every rank's."""
        return [obj] * self._size

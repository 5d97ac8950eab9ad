"""Tables of selection units and rows for kernels: made once a plan, kept on the device.

A plan's tensors are shared by all layers and steps and never written to. So a table is found again
by the tensor that it was made of, and no value is compared.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels import tile_ranges
from lcdist_kernels.tile_ranges import TABLES_KEPT, DeviceStream, Indices


class SameTensor:
    """A tensor as a key that equals itself alone."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __hash__(self) -> int:
        return id(self.tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SameTensor) and other.tensor is self.tensor


class Units(NamedTuple):
    """Selection units by row.

    of_row: the unit of each row, int64 on the CPU. starts: the first row of each unit, then the
    number of rows.
    """

    of_row: Tensor
    starts: list[int]


def on_device(table: Tensor, place: DeviceStream) -> Tensor:
    """Return a plan's int64 table as int32 on the device, sent once."""
    return _send(SameTensor(table), place)


@lru_cache(maxsize=TABLES_KEPT)
def _send(table: SameTensor, place: DeviceStream) -> Tensor:
    return tile_ranges.on_device(Indices(table.tensor), place)


def units_of(lengths: Tensor) -> Units:
    """Return the units of `lengths` rows each; lengths: int64 on the CPU, of a plan."""
    return _units(SameTensor(lengths))


@lru_cache(maxsize=TABLES_KEPT)
def _units(lengths: SameTensor) -> Units:
    count = lengths.tensor
    starts = [0, *count.cumsum(0).tolist()]
    return Units(torch.arange(len(count)).repeat_interleave(count), starts)

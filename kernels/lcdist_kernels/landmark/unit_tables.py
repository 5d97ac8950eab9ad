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
    number of rows. longest: rows of the longest unit.
    """

    of_row: Tensor
    starts: list[int]
    longest: int


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
    longest = int(count.max()) if len(count) else 0
    return Units(torch.arange(len(count)).repeat_interleave(count), starts, longest)


def unit_rows(lengths: Tensor, place: DeviceStream) -> Tensor:
    """Return the first row and the number of rows of each unit: int32 `[units, 2]`."""
    return _unit_rows(SameTensor(lengths), place)


@lru_cache(maxsize=TABLES_KEPT)
def _unit_rows(lengths: SameTensor, place: DeviceStream) -> Tensor:
    count = lengths.tensor
    return _send_rows(torch.stack((count.cumsum(0) - count, count), 1), place)


def unit_tiles(lengths: Tensor, tokens: int, place: DeviceStream) -> Tensor:
    """Return (unit, first row, number of rows) of tiles of `tokens` rows: int32 `[n, 3]`."""
    return _unit_tiles(SameTensor(lengths), tokens, place)


@lru_cache(maxsize=TABLES_KEPT)
def _unit_tiles(lengths: SameTensor, tokens: int, place: DeviceStream) -> Tensor:
    lengths_of = lengths.tensor
    starts, tiles_of = lengths_of.cumsum(0) - lengths_of, -(-lengths_of // tokens)
    unit = torch.arange(len(lengths_of)).repeat_interleave(tiles_of)
    before = (tiles_of.cumsum(0) - tiles_of)[unit]
    offset = (torch.arange(len(unit)) - before) * tokens
    count = (lengths_of[unit] - offset).clamp(max=tokens)
    return _send_rows(torch.stack((unit, starts[unit] + offset, count), 1), place)


def block_rows(slots: Tensor, block_size: int, count: int, place: DeviceStream) -> Tensor:
    """Return the first row and the number of rows inside each of `count` blocks: int32 `[n, 2]`.

    slots: of the rows, increasing; a plan's.
    """
    return _block_rows(SameTensor(slots), block_size, count, place)


@lru_cache(maxsize=TABLES_KEPT)
def _block_rows(slots: SameTensor, block_size: int, count: int, place: DeviceStream) -> Tensor:
    borders = torch.searchsorted(slots.tensor, torch.arange(count + 1) * block_size)
    return _send_rows(torch.stack((borders[:-1], borders.diff()), 1), place)


@lru_cache(maxsize=TABLES_KEPT)
def numbers_by_head(heads: int, count: int, place: DeviceStream) -> Tensor:
    """Return 0, 1, ... for each head: int32 `[heads, count]` on the device."""
    return torch.arange(count, dtype=torch.int32, device=place.device).repeat(heads, 1)


def _send_rows(table: Tensor, place: DeviceStream) -> Tensor:
    return tile_ranges.on_device(Indices(table.flatten()), place).view(table.shape)

"""Which tiles of a band a kernel visits: tables made on the host, kept by value, moved once.

A query sees the keys with q_lo <= k_idx <= q_idx. Where k_idx does not decrease, the keys that a
tile of queries sees anything of are one run of key tiles, and those that all its queries see
wholly are a run inside it, which needs no mask; both ends are found by binary search. The same
holds with the roles exchanged where q_idx and q_lo do not decrease. Numbers in another order are
legal: then every tile is visited, under a mask.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# A ring of 64 ranks meets as many sets of keys in a lap, and comes back to the lo.
KEPT = 128
LARGEST = 2**31 - 2


class Indices:
    """Global token numbers, int32 on the CPU, that compare by value: a copy, safe to keep."""

    __slots__ = ("_hash", "values")

    def __init__(self, values: Tensor) -> None:
        if len(values) and values.max() > LARGEST:
            raise ValueError(f"token number {int(values.max())}: kernels count to {LARGEST}")
        self.values = values.to("cpu", torch.int32, copy=True)
        ends = values[[0, -1]].tolist() if len(values) else []
        self._hash = hash((len(values), *ends))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Indices) and torch.equal(self.values, other.values)

    def sorted(self) -> bool:
        """Whether the numbers do not decrease."""
        return bool((self.values[1:] >= self.values[:-1]).all())

    def extremes(self, block: int) -> tuple[Tensor, Tensor]:
        """The least and the greatest number of every tile of `block`."""
        pad = self.values[-1:].expand(-len(self.values) % block)
        tiles = torch.cat((self.values, pad)).view(-1, block)
        return tiles.amin(1), tiles.amax(1)


class Band(NamedTuple):
    """The numbers of queries and keys, and the lo token of each query's document."""

    q_idx: Indices
    q_lo: Indices
    k_idx: Indices


class Place(NamedTuple):
    """Where a table lies, and on which stream it was sent there."""

    device: torch.device
    stream: int


def band_of(q_idx: Tensor, q_lo: Tensor, k_idx: Tensor) -> Band:
    """The band of token numbers as `full_fwd` takes them. Raises ValueError from 2^31 - 1 on."""
    return Band(Indices(q_idx), Indices(q_lo), Indices(k_idx))


def place_of(x: Tensor) -> Place:
    """Where the tables of a kernel on x must be."""
    if x.device.type != "cuda":
        return Place(x.device, 0)
    return Place(x.device, torch.cuda.current_stream(x.device).cuda_stream)


@lru_cache(maxsize=KEPT)
def on_device(indices: Indices, place: Place) -> Tensor:
    """The numbers as int32 on the device."""
    return _send(indices.values, place)


@lru_cache(maxsize=KEPT)
def bounded_below(band: Band) -> bool:
    """Whether q_lo hides any key from any query."""
    return bool(band.q_lo.values.max() > band.k_idx.values.min())


@lru_cache(maxsize=KEPT)
def key_ranges(band: Band, block_m: int, block_n: int, place: Place) -> Tensor:
    """For each tile of queries, key tiles (lo, lo whole, end of whole, end): int32 `[n, 4]`.

    Tiles in [lo whole, end of whole) have block_n keys, all seen by all queries of the tile.
    """
    keys = band.k_idx.values
    least, greatest = band.q_idx.extremes(block_m)
    if not band.k_idx.sorted():
        return _send(_all_masked(len(least), len(keys), block_n), place)
    least_lo, greatest_lo = band.q_lo.extremes(block_m)
    full_hi = torch.searchsorted(keys, least, right=True) // block_n
    ranges = _tiles(
        torch.searchsorted(keys, least_lo),
        torch.searchsorted(keys, greatest, right=True),
        torch.searchsorted(keys, greatest_lo),
        full_hi,
        block_n,
    )
    return _send(ranges, place)


@lru_cache(maxsize=KEPT)
def query_ranges(band: Band, block_m: int, block_n: int, place: Place) -> Tensor:
    """For each tile of keys, query tiles (lo, lo whole, end of whole, end): int32 `[n, 4]`.

    All queries there are in [lo whole, end of whole) see all keys of the tile; the last of
    these tiles may have fewer than block_m.
    """
    idx, lo = band.q_idx.values, band.q_lo.values
    least, greatest = band.k_idx.extremes(block_n)
    if not (band.q_idx.sorted() and band.q_lo.sorted()):
        return _send(_all_masked(len(least), len(idx), block_m), place)
    full_hi = torch.searchsorted(lo, least, right=True)
    full_hi = torch.where(full_hi == len(lo), -(-full_hi // block_m), full_hi // block_m)
    ranges = _tiles(
        torch.searchsorted(idx, least),
        torch.searchsorted(lo, greatest, right=True),
        torch.searchsorted(idx, greatest),
        full_hi,
        block_m,
    )
    return _send(ranges, place)


def _tiles(lo: Tensor, hi: Tensor, full_lo: Tensor, full_hi: Tensor, block: int) -> Tensor:
    """Runs of tiles from runs of tokens; `full_hi` is counted in tiles already."""
    hi = torch.where(hi > lo, -(-hi // block), 0)
    lo = torch.minimum(lo // block, hi)
    full_lo = torch.clamp(-(-full_lo // block), lo, hi)
    full_hi = torch.clamp(full_hi, full_lo, hi)
    return torch.stack((lo, full_lo, full_hi, hi), 1).to(torch.int32)


def _all_masked(count: int, seqlen: int, block: int) -> Tensor:
    tiles = -(-seqlen // block)
    return torch.tensor([0, tiles, tiles, tiles], dtype=torch.int32).repeat(count, 1)


def _send(table: Tensor, place: Place) -> Tensor:
    if place.device.type != "cuda":
        return table.to(place.device)
    # From pageable memory the copy would wait for all work on the stream.
    return table.pin_memory().to(place.device, non_blocking=True)

"""Tables of the tiles that a kernel visits: made on the host, cached by value, sent once.

A query sees the keys with q_lo <= k_idx <= q_idx. Where k_idx does not decrease, the keys that a
tile of queries sees form one run of key tiles:

    key tiles   lo ....... full_lo =========== full_hi ....... hi
                masked     every query sees     masked
                           every key: no mask

Both runs are found by binary search. The same holds for tiles of keys where q_idx and q_lo do not
decrease. Numbers in any other order are legal: then every tile is visited under a mask.
"""

from functools import lru_cache
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lcdist_kernels.common import TensorNotes

# Enough for a ring of 64 ranks, which visits 64 sets of keys and starts again.
TABLES_KEPT = 128
MAX_TOKEN = 2**31 - 2


class Indices:
    """Global token numbers: an int32 copy on the CPU that hashes and compares by value."""

    __slots__ = ("__weakref__", "_hash", "values")

    def __init__(self, values: Tensor) -> None:
        values = values.flatten()
        if len(values) and values.max() > MAX_TOKEN:
            raise ValueError(
                f"token number {int(values.max())}: kernels take numbers up to {MAX_TOKEN}"
            )
        self.values = values.to("cpu", torch.int32, copy=True)
        # Of all numbers, so that others of the same length and ends are told apart by their hash.
        self._hash = hash((len(values), int(values.sum()), int(values[::7].sum())))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Indices) and torch.equal(self.values, other.values)

    def sorted(self) -> bool:
        """Return whether the numbers do not decrease."""
        return bool((self.values[1:] >= self.values[:-1]).all())

    def extremes(self, block: int) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest number of every tile of `block` numbers."""
        pad = self.values[-1:].expand(-len(self.values) % block)
        tiles = torch.cat((self.values, pad)).view(-1, block)
        return tiles.amin(1), tiles.amax(1)


class Band(NamedTuple):
    """Numbers of queries and keys, and the first token of each query's document."""

    q_idx: Indices
    q_lo: Indices
    k_idx: Indices


class DeviceStream(NamedTuple):
    """Device of a table, and the CUDA stream that it was sent on."""

    device: torch.device
    stream: int


_INDICES = TensorNotes()
# By hash; two that share a hash by chance are not both in it.
_KNOWN: WeakValueDictionary[int, Indices] = WeakValueDictionary()


def indices_of(values: Tensor) -> Indices:
    """Return a tensor as `Indices`: the same object for equal numbers, so compared in no time."""

    def make() -> Indices:
        made = Indices(values)
        known = _KNOWN.setdefault(hash(made), made)
        return known if known == made else made

    return _INDICES.find(values, None, make)


def band_of(q_idx: Tensor, q_lo: Tensor, k_idx: Tensor) -> Band:
    """Return the band of token numbers. Raise ValueError from token 2^31 - 1 on."""
    return Band(indices_of(q_idx), indices_of(q_lo), indices_of(k_idx))


def device_stream(x: Tensor) -> DeviceStream:
    """Return the device and stream that the tables of a kernel on x need."""
    if x.device.type != "cuda":
        return DeviceStream(x.device, 0)
    return DeviceStream(x.device, torch.cuda.current_stream(x.device).cuda_stream)


@lru_cache(maxsize=TABLES_KEPT)
def on_device(indices: Indices, place: DeviceStream) -> Tensor:
    """Return the numbers as an int32 tensor on the device."""
    return send(indices.values, place)


@lru_cache(maxsize=TABLES_KEPT)
def bounded_below(band: Band) -> bool:
    """Return whether q_lo hides any key from any query."""
    return bool(band.q_lo.values.max() > band.k_idx.values.min())


@lru_cache(maxsize=TABLES_KEPT)
def key_ranges(band: Band, block_m: int, block_n: int, place: DeviceStream) -> Tensor:
    """Return (lo, full_lo, full_hi, hi) of key tiles for each tile of queries: int32 `[n, 4]`.

    Tiles in [full_lo, full_hi) have block_n keys, all visible to all queries of the tile.
    """
    keys = band.k_idx.values
    least, greatest = band.q_idx.extremes(block_m)
    if not band.k_idx.sorted():
        return send(_all_masked(len(least), len(keys), block_n), place)
    least_lo, greatest_lo = band.q_lo.extremes(block_m)
    full_hi = torch.searchsorted(keys, least, right=True) // block_n
    ranges = tiles_of_runs(
        torch.searchsorted(keys, least_lo),
        torch.searchsorted(keys, greatest, right=True),
        torch.searchsorted(keys, greatest_lo),
        full_hi,
        block_n,
    )
    return send(ranges, place)


def query_tables(band: Band, block_m: int, block_n: int, place: DeviceStream) -> list[Tensor]:
    """Return q_idx, q_lo, k_idx and ranges on the device, for a kernel that owns queries."""
    numbers = [on_device(indices, place) for indices in band]
    return [*numbers, key_ranges(band, block_m, block_n, place)]


def key_tables(band: Band, block_m: int, block_n: int, place: DeviceStream) -> list[Tensor]:
    """Return q_idx, q_lo, k_idx and ranges on the device, for a kernel that owns keys."""
    numbers = [on_device(indices, place) for indices in band]
    return [*numbers, query_ranges(band, block_m, block_n, place)]


@lru_cache(maxsize=TABLES_KEPT)
def query_ranges(band: Band, block_m: int, block_n: int, place: DeviceStream) -> Tensor:
    """Return (lo, full_lo, full_hi, hi) of query tiles for each tile of keys: int32 `[n, 4]`.

    All queries of tiles in [full_lo, full_hi) see all keys of the tile. The last of these tiles may
    have fewer than block_m queries.
    """
    idx, lo = band.q_idx.values, band.q_lo.values
    least, greatest = band.k_idx.extremes(block_n)
    if not (band.q_idx.sorted() and band.q_lo.sorted()):
        return send(_all_masked(len(least), len(idx), block_m), place)
    full_hi = torch.searchsorted(lo, least, right=True)
    full_hi = torch.where(full_hi == len(lo), -(-full_hi // block_m), full_hi // block_m)
    ranges = tiles_of_runs(
        torch.searchsorted(idx, least),
        torch.searchsorted(lo, greatest, right=True),
        torch.searchsorted(idx, greatest),
        full_hi,
        block_m,
    )
    return send(ranges, place)


def tiles_of_runs(lo: Tensor, hi: Tensor, full_lo: Tensor, full_hi: Tensor, block: int) -> Tensor:
    """Convert runs of tokens to runs of tiles; `full_hi` is already counted in tiles."""
    hi = torch.where(hi > lo, -(-hi // block), 0)
    lo = torch.minimum(lo // block, hi)
    full_lo = torch.clamp(-(-full_lo // block), lo, hi)
    full_hi = torch.clamp(full_hi, full_lo, hi)
    return torch.stack((lo, full_lo, full_hi, hi), 1).to(torch.int32)


def _all_masked(count: int, seqlen: int, block: int) -> Tensor:
    """Return ranges that visit every tile under a mask."""
    tiles = -(-seqlen // block)
    return torch.tensor([0, tiles, tiles, tiles], dtype=torch.int32).repeat(count, 1)


def send(table: Tensor, place: DeviceStream) -> Tensor:
    """Copy a table to the device without waiting for the stream."""
    if place.device.type != "cuda":
        return table.to(place.device)
    # A copy from pageable memory would wait for all work on the stream.
    return table.pin_memory().to(place.device, non_blocking=True)

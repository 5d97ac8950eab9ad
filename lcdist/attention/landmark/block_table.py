"""Contents of closed blocks: all on the device, or in host memory with some on the device.

A table's entry is a block of one key head: its keys and values, `[2, block size, d]`. `HostBlocks`
keeps all entries in host memory, pinned where the model is on a GPU, and a fixed number a row and
key head on the device. A block that is chosen and not there takes the place of the one that was
chosen longest ago, so only the difference between two choices is copied. Blocks that a layer is
expected to choose can be copied while the layer before it runs, on a stream of their own.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist.attention.cache import SwapCount
from lcdist.attention.landmark.copies import CopyStream, copied_entries, on_device_of


class Found(NamedTuple):
    """Say where some queries read the blocks that they chose.

    Attributes:
        start, stop: The queries.
        table: `[m, 2, block size, d]`.
        numbers: Number of the block in each entry of the table, int64 `[m]`.
        ids: Entries that each query reads, int32 `[1, h_kv, stop - start, K]`; -1: none.
    """

    start: int
    stop: int
    table: Tensor
    numbers: Tensor
    ids: Tensor


class BlockTable:
    """Blocks on the device.

    Args:
        rows: texts.
        limit: most blocks of a row.
    """

    def __init__(self, rows: int, limit: int) -> None:
        self._rows, self._limit = rows, limit
        self._numbers: list[list[int]] = [[] for _ in range(rows)]
        self._table: Tensor | None = None
        self.swaps: SwapCount | None = None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return 0 if self._table is None else self._table.nbytes

    def last_number(self, row: int) -> int:
        """Return the number of a row's last block; -1 for none."""
        return self._numbers[row][-1] if self._numbers[row] else -1

    def append(self, row: int, numbers: Tensor, k: Tensor, v: Tensor) -> None:
        """Append whole blocks.

        Args:
            row: number of the text.
            numbers: of the blocks, increasing: int64 `[n]` on the CPU.
            k, v: `[1, n * block size, h_kv, d]`.
        """
        blocks = torch.stack([x[0].unflatten(0, (len(numbers), -1)) for x in (k, v)], 1)
        blocks = blocks.permute(3, 0, 1, 2, 4)  # [h_kv, n, 2, block size, d]
        if self._table is None:
            self._table = self._new_table(blocks)
        start = len(self._numbers[row])
        self._table[row, :, start : start + len(numbers)] = blocks.to(self._table.device)
        self._numbers[row] += numbers.tolist()

    def _new_table(self, blocks: Tensor) -> Tensor:
        """Return room for the blocks of all rows: `[rows, h_kv, limit, 2, block size, d]`."""
        heads, _, *entry = blocks.shape
        return blocks.new_zeros(self._rows, heads, self._limit, *entry)

    def find(self, row: int, chosen: Tensor) -> Iterator[Found]:
        """Yield where queries read the blocks that they chose, in order of the queries.

        chosen: numbers of blocks, int32 `[1, h_kv, queries, K]`, -1 for none. Blocks that are not
        in the table are left out; nothing is yielded where it is empty.
        """
        heads, queries = chosen.shape[1], chosen.shape[2]
        if self._table is None or not self._numbers[row]:
            return
        held = torch.tensor(self._numbers[row], device=chosen.device)
        places = _places(chosen, held)
        first = torch.arange(heads, device=chosen.device, dtype=torch.int32) * self._limit
        ids = (places + first.view(1, -1, 1, 1)).masked_fill(places < 0, -1)
        numbers = torch.zeros(heads, self._limit, dtype=torch.int64, device=chosen.device)
        numbers[:, : len(held)] = held
        yield Found(0, queries, self._table[row].flatten(0, 1), numbers.flatten(), ids)


class _Moves(NamedTuple):
    """Entries of the host's table to copy, and of the device's buffer to write."""

    sources: list[int]
    targets: list[int]


class HostBlocks(BlockTable):
    """Blocks in host memory, of which some are on the device.

    Args:
        rows, limit: as in `BlockTable`.
        slots: blocks of each row and key head on the device.
    """

    def __init__(self, rows: int, limit: int, slots: int) -> None:
        super().__init__(rows, limit)
        self._slots = slots
        self._buffer: Tensor | None = None
        self._recent: list[list[OrderedDict[int, int]]] = []
        # Blocks that the last call needed, by row and key head.
        self._needed: list[list[list[int]]] = []
        self._count = self.swaps = SwapCount()
        self._expected: list[tuple[int, Tensor]] = []
        self._copies = CopyStream()

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.nbytes

    def expect(self, row: int, chosen: Tensor) -> None:
        """Take `chosen`, as of `find`, for what the next call will choose; does not wait."""
        if self._buffer is not None and self._numbers[row]:
            self._expected.append((row, self._copies.to_host(chosen[0])))

    def post(self) -> None:
        """Begin to copy blocks that are expected and not on the device.

        They take no place of a block that the last call needed: an expectation may be wrong, and
        the next choice often is the last one.
        """
        self._copies.wait_for_host()
        for row, chosen in self._expected:
            places, moves = _places(chosen, torch.tensor(self._numbers[row])), _Moves([], [])
            for head, recent in enumerate(self._recent[row]):
                expected = places[head].unique()
                expected = expected[expected >= 0].tolist()
                # Neither these nor what the last call needed may lose their places.
                stays = recent.keys() & {*expected, *self._needed[row][head]}
                for place in sorted(stays):
                    recent.move_to_end(place)
                missing = [place for place in expected if place not in recent]
                room = self._slots - len(stays)
                self._give_slots(row, head, missing[:room], moves)
            if moves.sources:
                with self._copies.ahead():
                    self._copy(row, moves)
                self._count.posted += len(moves.sources)
        self._expected.clear()

    def _new_table(self, blocks: Tensor) -> Tensor:
        heads, _, *entry = blocks.shape
        self._buffer = blocks.new_zeros(self._rows, heads, self._slots, *entry)
        self._recent = [[OrderedDict() for _ in range(heads)] for _ in range(self._rows)]
        self._needed = [[[] for _ in range(heads)] for _ in range(self._rows)]
        size = (self._rows, heads, self._limit, *entry)
        return torch.zeros(size, dtype=blocks.dtype, pin_memory=blocks.is_cuda)

    def find(self, row: int, chosen: Tensor) -> Iterator[Found]:
        """Yield where queries read the blocks that they chose; as `BlockTable.find`.

        Queries that need more blocks than there are slots are read in several parts. Copies and
        later reads are on the same stream, so a slot is not overwritten while it is read.
        """
        self._copies.join()
        if self._table is None or self._buffer is None or not self._numbers[row]:
            return
        held = torch.tensor(self._numbers[row])
        # The one wait for the device: the host must know what to copy.
        numbers = chosen[0].cpu()  # [h_kv, queries, K]
        places = _places(numbers, held)
        heads = len(numbers)
        for start, stop in self._parts(places, 0, places.shape[1]):
            slots = self._fetch(row, places[:, start:stop])
            of_slot = torch.full((heads, self._slots), -1, dtype=torch.int64)
            for head, recent in enumerate(self._recent[row]):
                used = torch.tensor(list(recent.items()), dtype=torch.int64).view(-1, 2)
                of_slot[head, used[:, 1]] = held[used[:, 0]]
            table = self._buffer[row].flatten(0, 1)
            ids = on_device_of(table, slots[None])
            yield Found(start, stop, table, on_device_of(table, of_slot.flatten()), ids)

    def _parts(self, places: Tensor, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of queries that need no more blocks of a key head than there are slots."""
        most = max(_distinct(head, start, stop) for head in places)
        if most <= self._slots:
            yield start, stop
            return
        middle = (start + stop) // 2
        yield from self._parts(places, start, middle)
        yield from self._parts(places, middle, stop)

    def _fetch(self, row: int, places: Tensor) -> Tensor:
        """Bring the blocks at `places` `[h_kv, queries, K]` to the device; return their entries."""
        assert self._table is not None and self._buffer is not None
        entries = torch.full_like(places, -1)
        moves = _Moves([], [])
        for head, recent in enumerate(self._recent[row]):
            needed = places[head].unique()
            needed = needed[needed >= 0].tolist()
            missing = [place for place in needed if place not in recent]
            for place in needed:
                if place in recent:
                    recent.move_to_end(place)
            self._give_slots(row, head, missing, moves)
            self._needed[row][head] = needed
            self._count.chosen += len(needed)
            if needed:
                known = torch.tensor(needed)
                slots = torch.tensor([head * self._slots + recent[place] for place in needed])
                found = torch.searchsorted(known, places[head].long()).clamp_max(len(needed) - 1)
                entries[head] = torch.where(places[head] >= 0, slots[found], -1).int()
        if moves.sources:
            self._copy(row, moves)
            self._count.copied += len(moves.sources)
        return entries

    def _give_slots(self, row: int, head: int, places: list[int], moves: "_Moves") -> None:
        """Give blocks that are not on the device the slots of those chosen longest ago."""
        recent = self._recent[row][head]
        for place in places:
            slot = len(recent)
            if slot == self._slots:
                _, slot = recent.popitem(last=False)
            recent[place] = slot
            moves.sources.append(head * self._limit + place)
            moves.targets.append(head * self._slots + slot)

    def _copy(self, row: int, moves: "_Moves") -> None:
        """Copy blocks of a row to the device."""
        assert self._table is not None and self._buffer is not None
        table, buffer = self._table[row].flatten(0, 1), self._buffer[row].flatten(0, 1)
        moved = copied_entries(table, moves.sources, buffer)
        buffer[on_device_of(buffer, moves.targets)] = moved
        self._count.bytes_copied += moved.nbytes


def _distinct(places: Tensor, start: int, stop: int) -> int:
    """Return how many blocks the queries start to stop need: places `[queries, K]`."""
    part = places[start:stop].unique()
    return int((part >= 0).sum())


def _places(chosen: Tensor, held: Tensor) -> Tensor:
    """Return the index in `held`, increasing numbers, of each chosen number; -1 where it is not."""
    if not len(held):
        return torch.full_like(chosen, -1)
    places = torch.searchsorted(held, chosen.long()).clamp_max(len(held) - 1)
    return places.masked_fill(held[places] != chosen, -1).int()

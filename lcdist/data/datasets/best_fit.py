"""Best-fit-decreasing packing by lengths, for millions of documents (arXiv:2404.10830).

Documents of one length are alike, and so are rows that were filled alike: they are handled
together, so the time grows with the number of different lengths, and not with that of documents.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# What is in a row: what was before, then `times` documents of `length`.
_Filled = tuple["_Filled", int, int] | None


@dataclass(frozen=True)
class Rows:
    """Items by row: row i has the items members[offsets[i]:offsets[i + 1]], both int64."""

    members: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def best_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """Items of 1 <= length <= capacity to rows: longest first, each where the least room remains.

    lengths: int64 `[n]`. Of items of equal length those with smaller numbers are taken first, so a
    caller who wants them mixed shuffles before.
    """
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= capacity)
    values, counts = np.unique(lengths, return_counts=True)
    shelf = _Shelf(capacity)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        shelf.place(length, count)
    starts = dict(zip(values.tolist(), (np.cumsum(counts) - counts).tolist(), strict=True))
    ordered = np.argsort(lengths, kind="stable")
    members, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for count, filled in shelf.groups():
        columns = []
        while filled is not None:
            filled, length, times = filled
            taken = ordered[starts[length] : starts[length] + count * times]
            starts[length] += count * times
            columns.insert(0, taken.reshape(count, times))
        rows = np.concatenate(columns, axis=1)
        members.append(rows.ravel())
        sizes.append(np.full(count, rows.shape[1], np.int64))
    ends = np.cumsum(np.concatenate(sizes))
    return Rows(np.concatenate(members), np.concatenate([np.zeros(1, np.int64), ends]))


class _Shelf:
    """Rows begun, by the room that remains in them; rows filled alike are one group."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._begun: dict[int, list[tuple[int, _Filled]]] = {}
        self._rooms: list[int] = []

    def place(self, length: int, count: int) -> None:
        """Put `count` items of `length` in; none that came before was shorter."""
        while count:
            room, rows, filled = self._tightest(length, count)
            # A row that fits best goes on fitting best until it cannot take another one.
            each = room // length
            whole = min(rows, count // each)
            self._put(room - each * length, whole, (filled, length, each))
            count, rows = count - whole * each, rows - whole
            if rows and 0 < count < each:
                self._put(room - count * length, 1, (filled, length, count))
                count, rows = 0, rows - 1
            if filled is not None:
                self._put(room, rows, filled)

    def groups(self) -> list[tuple[int, _Filled]]:
        """(rows, what is in each of them) of all groups, fullest first."""
        return [group for room in sorted(self._begun) for group in self._begun[room]]

    def _tightest(self, length: int, count: int) -> tuple[int, int, _Filled]:
        """Room, number and content of the rows with the least room for `length`, or of new ones."""
        place = bisect_left(self._rooms, length)
        if place == len(self._rooms):
            return self._capacity, count, None
        room = self._rooms[place]
        rows, filled = self._begun[room].pop()
        if not self._begun[room]:
            del self._begun[room], self._rooms[place]
        return room, rows, filled

    def _put(self, room: int, rows: int, filled: _Filled) -> None:
        if not rows:
            return
        if room not in self._begun:
            self._begun[room] = []
            if room:
                insort(self._rooms, room)
        self._begun[room].append((rows, filled))

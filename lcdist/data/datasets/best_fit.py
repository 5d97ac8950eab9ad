"""Best-fit-decreasing packing by length, for millions of documents (arXiv:2404.10830).

Documents of equal length are interchangeable, and so are rows that hold equal lengths. The
algorithm handles each such group at once, so its time grows with the number of different lengths
and not with the number of documents.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

# Contents of a row as a linked list: the earlier contents, then `count` documents of `length`.
_Contents = tuple["_Contents", int, int] | None


@dataclass(frozen=True)
class PackedRows:
    """Items by row: row i has the items members[offsets[i]:offsets[i + 1]]; both arrays int64."""

    members: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def best_fit(lengths: np.ndarray, capacity: int) -> PackedRows:
    """Pack items into rows: longest item first, each into the row with the least sufficient room.

    Among items of equal length those with smaller numbers are used first. To mix them, shuffle the
    items before.

    Args:
        lengths: int64 `[n]`, each in 1..capacity.
        capacity: length of a row.
    """
    assert not len(lengths) or (lengths.min() >= 1 and lengths.max() <= capacity)
    values, counts = np.unique(lengths, return_counts=True)
    open_rows = _OpenRows(capacity)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        open_rows.add(length, count)
    next_item = dict(zip(values.tolist(), (np.cumsum(counts) - counts).tolist(), strict=True))
    items_by_length = np.argsort(lengths, kind="stable")
    members, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for num_rows, contents in open_rows.groups():
        columns = []
        while contents is not None:
            contents, length, count = contents
            first = next_item[length]
            next_item[length] = first + num_rows * count
            columns.insert(0, items_by_length[first : next_item[length]].reshape(num_rows, count))
        rows = np.concatenate(columns, axis=1)
        members.append(rows.ravel())
        sizes.append(np.full(num_rows, rows.shape[1], np.int64))
    ends = np.cumsum(np.concatenate(sizes))
    return PackedRows(np.concatenate(members), np.concatenate([np.zeros(1, np.int64), ends]))


class _OpenRows:
    """Rows by their remaining room; rows with equal contents form one group."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._groups_by_room: dict[int, list[tuple[int, _Contents]]] = {}
        self._rooms: list[int] = []  # ascending

    def add(self, length: int, count: int) -> None:
        """Add `count` items of `length`, which is at most the length of all earlier items."""
        while count:
            room, num_rows, contents = self._pop_tightest(length, count)
            # The row with the best fit keeps it until it cannot hold another item of this length.
            per_row = room // length
            full_rows = min(num_rows, count // per_row)
            self._push(room - per_row * length, full_rows, (contents, length, per_row))
            count, num_rows = count - full_rows * per_row, num_rows - full_rows
            if num_rows and 0 < count < per_row:
                self._push(room - count * length, 1, (contents, length, count))
                count, num_rows = 0, num_rows - 1
            if contents is not None:
                self._push(room, num_rows, contents)

    def groups(self) -> list[tuple[int, _Contents]]:
        """Return (number of rows, contents of each) for all groups, fullest first."""
        rooms = sorted(self._groups_by_room)
        return [group for room in rooms for group in self._groups_by_room[room]]

    def _pop_tightest(self, length: int, count: int) -> tuple[int, int, _Contents]:
        """Return room, number and contents of the rows with the least room for `length`.

        If no row has room, return `count` new rows.
        """
        index = bisect_left(self._rooms, length)
        if index == len(self._rooms):
            return self._capacity, count, None
        room = self._rooms[index]
        num_rows, contents = self._groups_by_room[room].pop()
        if not self._groups_by_room[room]:
            del self._groups_by_room[room], self._rooms[index]
        return room, num_rows, contents

    def _push(self, room: int, num_rows: int, contents: _Contents) -> None:
        if not num_rows:
            return
        if room not in self._groups_by_room:
            self._groups_by_room[room] = []
            if room:
                insort(self._rooms, room)
        self._groups_by_room[room].append((num_rows, contents))

"""Tensors of a layer's tokens by row, in order of their positions."""

import torch
from torch import Tensor

LEAST_ROOM = 64


class TokenStore:
    """Growing tensors of tokens, a set for each row.

    Buffers are made at the first append, with the dtype and device of what is appended.

    Args:
        rows: texts.
        limit: most tokens of a row that may be held at once.
        grows: whether buffers grow with what they hold, for stores that drop tokens again.
    """

    def __init__(self, rows: int, limit: int, grows: bool = False) -> None:
        self._limit, self._grows = limit, grows
        self._buffers: tuple[Tensor, ...] = ()
        self._parts: list[tuple[Tensor, ...]] = [()] * rows
        self._positions = [torch.empty(0, dtype=torch.int64)] * rows
        self._lengths = [0] * rows

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers on the device."""
        parts = [part for row in self._parts for part in row] if self._grows else self._buffers
        return sum(part.nbytes for part in parts)

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The buffers `[rows, limit, ...]` of all rows, if they do not grow; () when empty."""
        return self._buffers

    def length(self, row: int) -> int:
        """Return how many tokens of a row are held."""
        return self._lengths[row]

    def positions(self, row: int) -> Tensor:
        """Return the positions of a row's tokens, increasing: int64 on the CPU."""
        return self._positions[row][: self._lengths[row]]

    def read(self, row: int) -> tuple[Tensor, ...]:
        """Return the row's tensors, `[1, tokens, ...]` each; views of the buffers."""
        return tuple(part[:, : self._lengths[row]] for part in self._parts[row])

    def append(self, row: int, positions: Tensor, *parts: Tensor) -> None:
        """Append tokens to a row.

        Args:
            row: number of the text.
            positions: of the tokens, int64 `[n]` on the CPU, greater than those before.
            parts: `[1, n, ...]` each.

        Raises:
            ValueError: more tokens than the limit.
        """
        count, held = len(positions), self._lengths[row]
        if held + count > self._limit:
            raise ValueError(f"{held + count} tokens do not fit a cache of {self._limit}")
        if held + count > len(self._positions[row]):
            self._make_room(row, held + count, parts)
        self._positions[row][held : held + count] = positions
        for buffer, part in zip(self._parts[row], parts, strict=True):
            buffer[:, held : held + count] = part
        self._lengths[row] = held + count

    def retain(self, row: int, kept: Tensor) -> None:
        """Forget tokens of a row, of a store that grows, and release their memory.

        kept: which of the row's tokens stay, bool `[tokens]` on the CPU.
        """
        assert self._grows
        index = kept.nonzero().flatten()
        parts = self.read(row)
        if parts:
            chosen = index.to(parts[0].device)
            parts = tuple(part[:, chosen] for part in parts)
        positions = self.positions(row)[index]
        self._positions[row], self._parts[row], self._lengths[row] = positions, parts, len(index)

    def _make_room(self, row: int, needed: int, like: tuple[Tensor, ...]) -> None:
        """Move what is held to the start of buffers that have room for `needed` tokens."""
        if not self._grows:
            self._positions[row] = torch.empty(self._limit, dtype=torch.int64)
            if not self._buffers:
                rows = len(self._parts)
                self._buffers = tuple(x.new_zeros(rows, self._limit, *x.shape[2:]) for x in like)
            self._parts[row] = tuple(buffer[row : row + 1] for buffer in self._buffers)
            return
        # Half as much again, so that moving costs a constant for each token.
        size = min(self._limit, needed + max(LEAST_ROOM, needed // 2))
        held, positions = self.read(row), self.positions(row)
        fresh = torch.empty(size, dtype=torch.int64)
        fresh[: len(positions)] = positions
        buffers = tuple(x.new_zeros(1, size, *x.shape[2:]) for x in like)
        for buffer, part in zip(buffers, held, strict=bool(held)):
            buffer[:, : part.shape[1]] = part
        self._parts[row], self._positions[row] = buffers, fresh

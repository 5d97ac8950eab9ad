"""Random choices that are the same on every machine and in every version of Python and numpy.

`random.Random` promises that of `random()` alone: choices, samples and shuffles have changed
between versions. Here they are all made from the raw words of a counter-based generator.
"""

import hashlib
from collections.abc import MutableSequence, Sequence
from typing import TypeVar

from lcdist.data.datasets.sample import random_uint64

T = TypeVar("T")
_WORDS = 256


class Draws:
    """A sequence of choices that a key determines: equal keys make equal choices.

    Args:
        key: numbers and words, such as a seed, the name of a task and the number of a case.
    """

    def __init__(self, *key: int | str) -> None:
        self._key = key
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._words = (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big"))
        self._blocks, self._left = 0, list[int]()

    def part(self, name: str) -> "Draws":
        """Return choices of their own for one purpose, which those for another do not change."""
        return Draws(*self._key, name)

    def below(self, limit: int) -> int:
        """Return a number in 0..limit - 1, each equally likely."""
        # Words above the last whole multiple would make the first numbers likelier.
        whole = 2**64 - 2**64 % limit
        while (word := self._next()) >= whole:
            pass
        return word % limit

    def between(self, first: int, last: int) -> int:
        """Return a number in first..last."""
        return first + self.below(last - first + 1)

    def choice(self, values: Sequence[T]) -> T:
        """Return one of the values."""
        return values[self.below(len(values))]

    def sample(self, count: int, size: int) -> list[int]:
        """Return `size` different numbers below `count`, in the order of their drawing."""
        # The first steps of a shuffle of all numbers, of which only those that moved are kept.
        moved: dict[int, int] = {}
        drawn = []
        for place in range(size):
            other = place + self.below(count - place)
            drawn.append(moved.get(other, other))
            moved[other] = moved.get(place, place)
        return drawn

    def shuffle(self, values: MutableSequence[T]) -> None:
        """Put the values in another order, each order equally likely."""
        for place in range(len(values) - 1, 0, -1):
            other = self.below(place + 1)
            values[place], values[other] = values[other], values[place]

    def _next(self) -> int:
        """Return the next 64-bit word."""
        if not self._left:
            self._left = random_uint64(_WORDS, self._words, self._blocks).tolist()[::-1]
            self._blocks += 1
        return self._left.pop()

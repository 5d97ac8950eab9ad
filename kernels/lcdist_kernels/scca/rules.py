"""Rules: which keys a query sees in SCCA and related patterns (arXiv:2312.07305).

With i and j the places of query and key in their common document, j <= i, and [x] = floor(x):

    chunk   [(j + s) / w] = [i / w]                     keys delayed by s, chunks of w tokens
    fold    [j / w] = c - (m mod (c + 1)),  c = [i / w], m = s / w     never an empty chunk
    split   [(j + s) / w] = [(i + s) / w]               S2 (arXiv:2309.12307), borders split
    pair    (i - j - s) mod r = 0                       every r-th distance
    key     j mod r = s                                 every r-th key

The paper gives neither distances nor wrap-around; these are this project's interpretation. All
rules are causal. A key that would wrap around to a later position is not visible.
"""

from collections.abc import Iterable, Sequence
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("chunk", "fold", "split", "pair", "key")
WINDOWS = ("chunk", "fold", "split")


class Rule(NamedTuple):
    """Rule of one head. kind: one of `KINDS`; size: w or r; shift: s, in tokens."""

    kind: str
    size: int
    shift: int = 0

    @property
    def is_window(self) -> bool:
        """Return whether a query's keys are one interval, given by `limits`."""
        return self.kind in WINDOWS

    def mask(self, i: Tensor, j: Tensor) -> Tensor:
        """Return True where a query at `i` sees a key at `j` of its document; i, j broadcast."""
        size, shift = self.size, self.shift
        chunk = i // size
        if self.kind == "chunk":
            visible = (j + shift) // size == chunk
        elif self.kind == "fold":
            visible = j // size == chunk - (shift // size) % (chunk + 1)
        elif self.kind == "split":
            visible = (j + shift) // size == (i + shift) // size
        elif self.kind == "pair":
            visible = (i - j - shift) % size == 0
        else:
            visible = j % size == shift
        return visible & (j <= i)

    def limits(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first and the last key that queries at `i` see; none where first > last.

        For `pair` and `key` this is the interval that contains the visible keys.
        """
        size, shift = self.size, self.shift
        if not self.is_window:
            return torch.zeros_like(i), i
        if self.kind == "chunk":
            first = i // size * size - shift
        elif self.kind == "fold":
            chunk = i // size
            first = (chunk - (shift // size) % (chunk + 1)) * size
        else:
            first = (i + shift) // size * size - shift
        return first.clamp_min(0), torch.minimum(i, first + size - 1)

    def window_ends(self, begin: int, end: int) -> Tensor:
        """Return, for a window rule, the last place of each run of queries with one window.

        The runs cover begin..end.
        """
        ahead = self.shift if self.kind == "split" else 0
        first = begin + self.size - 1 - (begin + ahead) % self.size
        return torch.cat(
            (torch.arange(min(first, end - 1), end - 1, self.size), torch.tensor([end - 1]))
        )

    def pairs(self, seqlen: int) -> int:
        """Return the number of visible (query, key) pairs of a document of `seqlen` tokens.

        In closed form, as plans count documents of any length.
        """
        size, shift = self.size, self.shift
        if not self.is_window:
            blocks, rest = divmod(max(0, seqlen - shift), size)
            return size * _triangle(blocks) + rest * (blocks + 1)
        if self.kind == "split":
            ahead = min(seqlen, -shift % size)
            chunks, rest = divmod(seqlen - ahead, size)
            return _triangle(ahead) + chunks * _triangle(size) + _triangle(rest)
        chunks, rest = divmod(seqlen, size)
        if self.kind == "fold":
            # A chunk whose number divides the distance sees itself, the others an earlier one.
            own = _divisors(shift // size, chunks)
            pairs = own * _triangle(size) + (chunks - own) * size**2
            is_own = shift // size % (chunks + 1) == 0
            return pairs + (_triangle(rest) if is_own else rest * size)
        whole = -(-shift // size)  # the first chunk whose window has all its keys
        pairs = max(0, chunks - whole) * self._chunk_pairs(whole, size)
        if 0 < whole <= chunks:
            pairs += self._chunk_pairs(whole - 1, size)
        return pairs + self._chunk_pairs(chunks, rest)

    def _chunk_pairs(self, chunk: int, queries: int) -> int:
        """Count the pairs of the first `queries` queries of a chunk, for kind "chunk"."""
        first = chunk * self.size - self.shift
        if first >= 0:
            return _sum_of_least(queries, self.shift + 1, self.size)
        return _sum_of_least(queries, chunk * self.size + 1, max(0, first + self.size))


def _triangle(count: int) -> int:
    return count * (count + 1) // 2


def _sum_of_least(count: int, first: int, most: int) -> int:
    """Return the sum of min(first + t, most) over t from 0 to count - 1."""
    below = min(max(most - first, 0), count)
    return below * first + _triangle(below - 1) + (count - below) * most


def _divisors(number: int, most: int) -> int:
    """Return how many of 1..most divide `number`; all of them divide 0."""
    if number == 0:
        return most
    low = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return sum(d <= most for d in {*low, *(number // d for d in low)})


class HeadGroup(NamedTuple):
    """Key heads whose query heads follow the same rules.

    kv: the key heads. members: slices of each one's query heads, with their rule.
    """

    kv: slice
    members: tuple[tuple[slice, Rule], ...]


def head_groups(rules: Sequence[Rule], nheads_kv: int) -> tuple[HeadGroup, ...]:
    """Group the heads of `rules`, one per query head, into slices of the head dimensions."""
    size = len(rules) // nheads_kv
    alike: dict[tuple[Rule, ...], list[int]] = {}
    for kv in range(nheads_kv):
        alike.setdefault(tuple(rules[kv * size : kv * size + size]), []).append(kv)
    return tuple(
        HeadGroup(kv, tuple(_members(followed)))
        for followed, numbers in alike.items()
        for kv in slices(numbers)
    )


def _members(followed: tuple[Rule, ...]) -> Iterable[tuple[slice, Rule]]:
    """Yield the slices of query heads that follow one rule."""
    for rule in dict.fromkeys(followed):
        for members in slices([i for i, other in enumerate(followed) if other == rule]):
            yield members, rule


def slices(numbers: Sequence[int]) -> list[slice]:
    """Return increasing numbers as few slices, each of a constant step."""
    found: list[list[int]] = []
    for number in numbers:
        last = found[-1] if found else []
        if last and (len(last) == 1 or number - last[-1] == last[1] - last[0]):
            last.append(number)
        else:
            found.append([number])
    return [slice(n[0], n[-1] + 1, n[1] - n[0] if len(n) > 1 else 1) for n in found]


def dense_mask(
    rules: Sequence[Rule], index: Tensor, starts: Tensor, k_index: Tensor, k_starts: Tensor
) -> Tensor:
    """Return True where each head's queries see keys: bool `[len(rules), s_q, s_k]`.

    index, k_index: global token numbers of queries and keys, int64 on the CPU. starts, k_starts:
    the first token of each one's document.
    """
    same = starts[:, None] == k_starts
    i, j = (index - starts)[:, None], k_index - k_starts
    by_rule = {rule: rule.mask(i, j) & same for rule in dict.fromkeys(rules)}
    return torch.stack([by_rule[rule] for rule in rules])

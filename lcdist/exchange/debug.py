"""LCDIST_DEBUG=1: before each exchange all ranks compare what they are about to do.

A wrong order of exchanges, a forgotten one, or another shape becomes an error that names the rank,
instead of a hang or of numbers that look right.
"""

import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch


@dataclass(frozen=True)
class Label:
    """What all ranks must agree on: verb, step within it, shape before the exchange and dtype."""

    verb: str
    step: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    detail: Any = None

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        words = f"{self.verb} {self.step}, [{shape}] {self.dtype}"
        return words if self.detail is None else f"{words}, {self.detail}"


def debugging() -> bool:
    """Whether LCDIST_DEBUG is set to 1."""
    return os.environ.get("LCDIST_DEBUG") == "1"


class _Numbers:
    """How many exchanges each group has begun, for as long as the group lives."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begun: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def next(self, group: Any) -> int:
        with self._lock:
            number = self._begun.get(group, 0)
            self._begun[group] = number + 1
        return number


_NUMBERS = _Numbers()


def compare(group: Any, label: Label, share: Callable[[Any], list[Any]]) -> None:
    """Raises RuntimeError on all ranks, naming those in the minority, unless all labels agree.

    share: gives every rank's object, in rank order.
    """
    mine = (_NUMBERS.next(group), label)
    everyone = share(mine)
    common = Counter(everyone).most_common(1)[0][0]
    odd = [rank for rank, theirs in enumerate(everyone) if theirs != common]
    if odd:
        others = [rank for rank in range(len(everyone)) if rank not in odd]
        lines = [f"  rank {rank}: {_say(everyone[rank])}" for rank in odd]
        raise RuntimeError(
            "LCDIST_DEBUG: the ranks disagree about the next exchange\n"
            + "\n".join(lines)
            + f"\n  ranks {others}: {_say(common)}"
        )


def _say(entry: tuple[int, Label]) -> str:
    return f"exchange {entry[0]}, {entry[1]}"

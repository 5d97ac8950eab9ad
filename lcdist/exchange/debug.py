"""Compare all ranks' exchanges before they start; enabled by LCDIST_DEBUG=1.

Ranks may call exchanges in different orders, miss one, or pass different shapes. This check turns
such a bug into an error that names the rank, instead of a hang or silently wrong numbers.
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
    """Description of one exchange, on which all ranks must agree.

    Args:
        verb: exchange name, as in `traffic.VERBS`.
        step: step within the exchange, e.g. "forward".
        shape: shape of the tensor before the exchange; -1 where ranks may differ.
        dtype: dtype of the tensor.
        detail: further values that must agree, e.g. the sizes; None for none.
    """

    verb: str
    step: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    detail: Any = None

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        text = f"{self.verb} {self.step}, [{shape}] {self.dtype}"
        return text if self.detail is None else f"{text}, {self.detail}"


def debug_enabled() -> bool:
    """Return True if LCDIST_DEBUG is set to 1."""
    return os.environ.get("LCDIST_DEBUG") == "1"


class _ExchangeCounter:
    """Number of exchanges started per group; an entry lives as long as its group."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._started: WeakKeyDictionary[Any, int] = WeakKeyDictionary()

    def next(self, group: Any) -> int:
        with self._lock:
            number = self._started.get(group, 0)
            self._started[group] = number + 1
        return number


_COUNTER = _ExchangeCounter()


def check_agreement(
    group: Any, label: Label, all_gather_object: Callable[[Any], list[Any]]
) -> None:
    """Raise RuntimeError on all ranks unless all their labels agree.

    The message names the ranks that differ from the majority.

    Args:
        group: group of the exchange; its exchanges are numbered.
        label: this rank's description of the exchange.
        all_gather_object: returns all ranks' objects in rank order.
    """
    entry = (_COUNTER.next(group), label)
    entries = all_gather_object(entry)
    majority = Counter(entries).most_common(1)[0][0]
    odd_ranks = [rank for rank, other in enumerate(entries) if other != majority]
    if odd_ranks:
        others = [rank for rank in range(len(entries)) if rank not in odd_ranks]
        lines = [f"  rank {rank}: {_describe(entries[rank])}" for rank in odd_ranks]
        raise RuntimeError(
            "LCDIST_DEBUG: the ranks disagree about the next exchange\n"
            + "\n".join(lines)
            + f"\n  ranks {others}: {_describe(majority)}"
        )


def _describe(entry: tuple[int, Label]) -> str:
    return f"exchange {entry[0]}, {entry[1]}"

"""Plans: tables that a call needs, made once for each set of small values and kept by their bytes.

A plan depends on small values alone: rules or options, length, document borders, tile sizes,
device. All layers and micro-batches with the same values share it, forward and backward. Everything
that takes time in proportion to the length happens when it is made; a later call finds it by its
key.
"""

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

MAX_BYTES = 512 << 20


class PlanCache:
    """Plans by key; drops the least recently used ones above `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._num_bytes = 0

    def find(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the plan of `key`; call `make` if it is not cached.

        Threads of virtual ranks share the cache: two that miss at once both make the plan.
        """
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key][0]
        # A tensor made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            plan = make()
        num_bytes = tensor_bytes(plan)
        with self._lock:
            if key not in self._entries:
                self._entries[key] = plan, num_bytes
                self._num_bytes += num_bytes
            while self._num_bytes > self._max_bytes and len(self._entries) > 1:
                _, (_, dropped_bytes) = self._entries.popitem(last=False)
                self._num_bytes -= dropped_bytes
        return plan

    def cached(self, fn: Callable[..., T]) -> Callable[..., T]:
        """Cache a planning function by its positional arguments, which must be hashable.

        All functions share `max_bytes`. The result is shared: never write to its tensors.
        """

        @functools.wraps(fn)
        def plan(*args: Hashable) -> T:
            return self.find((fn, *args), lambda: fn(*args))

        return plan


_PLANS = PlanCache(MAX_BYTES)

cached_plan = _PLANS.cached


def tensor_bytes(plan: Any) -> int:
    """Return the bytes of all tensors in nested sequences and mappings; shared storage counts once.

    A view counts as its whole storage.
    """
    storages: dict[int, int] = {}

    def visit(x: Any) -> None:
        if isinstance(x, Tensor):
            storage = x.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(x, Mapping):
            for value in x.values():
                visit(value)
        elif isinstance(x, Sequence) and not isinstance(x, str):
            for value in x:
                visit(value)

    visit(plan)
    return sum(storages.values())

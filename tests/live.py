"""Count what torch allocates inside a block, operator by operator, without timing.

A storage counts from the operator that made it until it is freed. Memory that an operator allocates
and frees internally is not seen.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of living tensors made in the block: now and peak; largest: elements of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._seen: dict[int, Any] = {}

    def watch(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Count memory that was made before the block, too."""
        for storage in storages:
            self._count(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known = {id_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                # A broadcast view has many elements and no memory for them.
                size = x.untyped_storage().nbytes() // x.element_size()
                self.largest = max(self.largest, min(x.numel(), size))
                if id_of(x) not in known:
                    self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = weakref.finalize(storage, self._free, key, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _free(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


def id_of(x: torch.Tensor) -> int:
    """Return a name for the memory behind `x`."""
    return x.untyped_storage()._cdata

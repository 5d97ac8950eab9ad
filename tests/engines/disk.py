"""A stand-in for DeepSpeed's `async_io`, whose compiler takes minutes: plain reads and writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from lcdist.hardware.deepspeed_on_cpu import import_deepspeed


class Handle:
    """Reads and writes at once, and counts what `wait` is to return."""

    def __init__(self, **settings: Any) -> None:
        self._done = 0
        self._pinned: set[int] = set()

    def new_cpu_locked_tensor(self, count: int, like: Tensor) -> Tensor:
        """Return an empty tensor, which counts as pinned."""
        made = torch.empty(count, dtype=like.dtype)
        self._pinned.add(made.untyped_storage().data_ptr())
        return made

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        """Forget a tensor."""
        self._pinned.discard(tensor.untyped_storage().data_ptr())
        return True

    def is_pinned(self, tensor: Tensor) -> bool:
        """Return whether a tensor lies in one of `new_cpu_locked_tensor`."""
        return tensor.untyped_storage().data_ptr() in self._pinned

    def async_pread(self, tensor: Tensor, path: str, offset: int) -> int:
        """Read a whole tensor."""
        size = tensor.numel() * tensor.element_size()
        with open(path, "rb") as file:
            file.seek(offset)
            found = torch.frombuffer(bytearray(file.read(size)), dtype=torch.uint8)
        assert len(found) == size, f"{path} has {len(found)} bytes, not {size}"
        tensor.detach().copy_(found.view(tensor.dtype))
        self._done += 1
        return 0

    def async_pwrite(self, tensor: Tensor, path: str, offset: int) -> int:
        """Write a whole tensor."""
        assert not offset
        Path(path).write_bytes(bytes(tensor.detach().contiguous().view(torch.uint8).numpy().data))
        self._done += 1
        return 0

    def wait(self) -> int:
        """Return the number of reads and writes since the last call."""
        done, self._done = self._done, 0
        return done


@contextmanager
def disk_in_python() -> Iterator[None]:
    """Let DeepSpeed find the stand-in as its `async_io` inside the block."""
    builder = import_deepspeed().ops.op_builder.AsyncIOBuilder
    with (
        patch.object(builder, "load", lambda self, *_, **__: SimpleNamespace(aio_handle=Handle)),
        patch.object(builder, "is_compatible", lambda self, *_, **__: True),
    ):
        yield

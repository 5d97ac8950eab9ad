"""Copies between host and device that run beside the layers' work."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class CopyStream:
    """Order copies that are posted ahead with the layers' own work; without a GPU it does nothing.

    The layers work on the current stream. Posted copies have a stream of their own, which begins
    where the last tensor was sent to the host.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._sent: torch.cuda.Event | None = None
        self._done: torch.cuda.Event | None = None

    def to_host(self, x: Tensor) -> Tensor:
        """Return a copy in host memory, which has its values after `wait_for_host`."""
        if not x.is_cuda:
            return x
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        self._sent = torch.cuda.Event()
        self._sent.record()
        return copy

    def wait_for_host(self) -> None:
        """Wait until the tensors of `to_host` have their values."""
        if self._sent is not None:
            self._sent.synchronize()

    @contextlib.contextmanager
    def ahead(self) -> Iterator[None]:
        """Run what is in the block beside the layers' work."""
        if self._sent is None:
            yield
            return
        self._stream = self._stream or torch.cuda.Stream()
        # What the layers read before the last `to_host` may be overwritten.
        self._stream.wait_event(self._sent)
        with torch.cuda.stream(self._stream):
            yield
        self._done = torch.cuda.Event()
        self._done.record(self._stream)

    def join(self) -> None:
        """Let the layers' next work come after the copies."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)
            self._done = None


def on_device_of(like: Tensor, values: Sequence[int] | Tensor) -> Tensor:
    """Return integers on the device of `like`, sent without a wait."""
    x = torch.as_tensor(values)
    return x.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else x


def copied_entries(table: Tensor, entries: Sequence[int], like: Tensor) -> Tensor:
    """Return entries of a table in host memory on the device of `like`."""
    index = torch.tensor(entries)
    if not like.is_cuda:
        return table[index]
    staged = torch.empty(len(index), *table.shape[1:], dtype=table.dtype, pin_memory=True)
    torch.index_select(table, 0, index, out=staged)
    return staged.to(like.device, non_blocking=True)

"""Offload layer inputs to host memory between forward and backward (as in arXiv:2104.07857).

Each input is copied to the host while the next layer computes, and back while the layer after it
runs its backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class CpuOffload:
    """Stores the layer inputs of one model chunk in host memory between forward and backward.

    On CUDA, copies go to pinned memory on a stream of their own. On a CPU they are plain copies:
    they save no memory, but let tests check the values.
    """

    def __init__(self) -> None:
        self._last: tuple[int, OffloadedTensor | None] = (-1, None)
        self._stream: Any = None

    def put(self, layer: int, x: Tensor) -> "OffloadedTensor":
        """Start copying x, the input of layer `layer`, to the host; x may be freed at once."""
        # Passes through the chunk do not interleave: the last input is that of the layer before.
        last_layer, last = self._last
        offloaded = self.send(x, last if last_layer == layer - 1 else None)
        self._last = layer, offloaded
        return offloaded

    def send(self, x: Tensor, previous: "OffloadedTensor | None") -> "OffloadedTensor":
        """Start copying x to the host; previous: as of `OffloadedTensor`."""
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        self.copy(host, x)
        if x.is_cuda:
            # Keep the memory from reuse until the asynchronous copy has finished.
            x.record_stream(self._stream)
        return OffloadedTensor(self, host, x.device, previous)

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy on the copy stream, after all work queued so far; return its CUDA event or None."""
        device = target.device if target.is_cuda else source.device
        if device.type != "cuda":
            target.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()


class OffloadedTensor:
    """One tensor in host memory.

    previous: the input of the layer before, which backward needs next; it is prefetched.
    """

    def __init__(
        self,
        store: CpuOffload,
        host: Tensor,
        device: torch.device,
        previous: "OffloadedTensor | None",
    ) -> None:
        self.store, self.host, self.device, self.previous = store, host, device, previous
        self.on_device: Tensor | None = None
        self.copy_event: Any = None
        self.more: list[OffloadedTensor] = []

    def add(self, more: Sequence[Tensor]) -> None:
        """Start copying more tensors of the same layer, which come back with this one."""
        self.more += [self.store.send(x, None) for x in more]

    def fetch(self) -> None:
        """Start copying the tensors back to their device, if that has not been done."""
        for one in self.more:
            one.fetch()
        if self.on_device is None:
            # Allocate on the compute stream, which waits for the copy before it reads or frees.
            self.on_device = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
            self.copy_event = self.store.copy(self.on_device, self.host)

    def get(self) -> Tensor:
        """Return the tensor on its device and start fetching the previous one; call it once."""
        self.fetch()
        if self.copy_event is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copy_event)
        if self.previous is not None:
            self.previous.fetch()
        x, self.previous = self.on_device, None
        assert x is not None
        self.on_device = self.copy_event = None
        del self.host
        return x

    def get_all(self) -> list[Tensor]:
        """Return the tensor as `get` does, then those that were added to it."""
        return [self.get(), *(one.get() for one in self.more)]

"""Activations that wait for backward in the host's memory (as in arXiv:2104.07857, for inputs of
layers): copied there while the next layer computes, and back while the one after it does.
"""

from typing import Any

import torch
from torch import Tensor


class CpuOffload:
    """The layers' inputs of one model chunk, away from the device between forward and backward.

    On CUDA copies are made by a stream of their own, to pinned memory. On a CPU they are plain
    copies, which saves nothing there and shows that what comes back is what went.
    """

    def __init__(self) -> None:
        self._last: tuple[int, OffloadedTensor | None] = (-1, None)
        self._stream: Any = None

    def put(self, layer: int, x: Tensor) -> "OffloadedTensor":
        """Start to copy the input of layer number `layer` to the host; x may be freed at once."""
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda)
        self.copy(host, x)
        if x.is_cuda:
            # Its memory is nobody else's before the copy is made.
            x.record_stream(self._stream)
        # A pass through the chunk's layers is never interrupted by another one.
        number, last = self._last
        away = OffloadedTensor(self, host, x.device, last if number == layer - 1 else None)
        self._last = layer, away
        return away

    def copy(self, to: Tensor, source: Tensor) -> Any:
        """Copy beside what is computed, after all that was asked for before; the event, or None."""
        device = to.device if to.is_cuda else source.device
        if device.type != "cuda":
            to.copy_(source)
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
            return self._stream.record_event()


class OffloadedTensor:
    """One tensor in the host's memory, and the one that backward asks for after it."""

    def __init__(
        self,
        store: CpuOffload,
        host: Tensor,
        device: torch.device,
        before: "OffloadedTensor | None",
    ) -> None:
        self.store, self.host, self.device, self.before = store, host, device, before
        self.here: Tensor | None = None
        self.copied: Any = None

    def fetch(self) -> None:
        """Start to copy it back, once."""
        if self.here is None:
            # Made on the stream that computes, which waits for the copy before it reads or frees.
            self.here = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
            self.copied = self.store.copy(self.here, self.host)

    def get(self) -> Tensor:
        """The tensor, on its device; may be asked for once. The one before it sets out."""
        self.fetch()
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
        if self.before is not None:
            self.before.fetch()
        here, self.before = self.here, None
        assert here is not None
        self.here = self.copied = None
        del self.host
        return here

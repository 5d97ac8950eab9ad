"""Many ranks as threads of one process: a group for tests, for a laptop, and for counting traffic.

Messages are copied when they are posted, as on a wire, and wait in the receiver's box.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lcdist.exchange.traffic import adopt, lineage

T = TypeVar("T")
WAIT_SECONDS = 60.0


class VirtualGroupAborted(RuntimeError):
    """Another virtual rank failed: its exception is the one to read."""


class _Boxes:
    """Messages under way, each with its number among those from `src` to `dst`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._arrived = [threading.Condition() for _ in range(size)]
        self._box: list[dict[tuple[int, int], Any]] = [{} for _ in range(size)]
        self._sent: list[Counter[int]] = [Counter() for _ in range(size)]
        self._expected: list[Counter[int]] = [Counter() for _ in range(size)]
        self.error: BaseException | None = None

    def put(self, src: int, dst: int, message: Any) -> None:
        with self._arrived[dst]:
            number = self._sent[dst][src]
            self._sent[dst][src] += 1
            self._box[dst][src, number] = message
            self._arrived[dst].notify_all()

    def expect(self, src: int, dst: int) -> int:
        """The number of the next message from `src`: messages match in the order posted."""
        with self._arrived[dst]:
            number = self._expected[dst][src]
            self._expected[dst][src] += 1
            return number

    def take(self, src: int, dst: int, number: int) -> Any:
        box, arrived = self._box[dst], self._arrived[dst]
        with arrived:
            came = arrived.wait_for(
                lambda: (src, number) in box or self.error is not None, WAIT_SECONDS
            )
            if self.error is not None:
                raise VirtualGroupAborted(f"rank {dst} stops: another rank failed: {self.error!r}")
            if not came:
                raise TimeoutError(
                    f"rank {dst} waited {WAIT_SECONDS:g} s for message {number} from rank {src}"
                )
            return box.pop((src, number))

    def abort(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        for arrived in self._arrived:
            with arrived:
                arrived.notify_all()

    def left(self) -> list[tuple[int, int]]:
        return [(src, dst) for dst, box in enumerate(self._box) for src, _ in box]


class _Arrivals:
    """Messages to wait for, each with the buffer that takes it."""

    def __init__(self, boxes: _Boxes, rank: int, recvs: Sequence[tuple[int, Tensor]]) -> None:
        self._boxes, self._rank = boxes, rank
        self._due = [(src, boxes.expect(src, rank), buffer) for src, buffer in recvs]

    def wait(self) -> None:
        for src, number, buffer in self._due:
            message = self._boxes.take(src, self._rank, number)
            if message.shape != buffer.shape or message.dtype != buffer.dtype:
                raise RuntimeError(
                    f"rank {self._rank} expected {tuple(buffer.shape)} {buffer.dtype} from rank "
                    f"{src}, which sent {tuple(message.shape)} {message.dtype}"
                )
            buffer.copy_(message)
        self._due = []


class _Sum:
    """Waits for every rank's part and adds them in rank order."""

    def __init__(self, arrivals: _Arrivals, parts: Tensor, out: Tensor) -> None:
        self._arrivals, self._parts, self._out = arrivals, parts, out

    def wait(self) -> None:
        self._arrivals.wait()
        self._out.copy_(self._parts[0])
        for part in self._parts[1:]:
            self._out.add_(part)


class VirtualRank:
    """One rank of a `VirtualGroup`; accepted wherever a process group is."""

    def __init__(self, boxes: _Boxes, rank: int) -> None:
        self._boxes, self._rank = boxes, rank

    def rank(self) -> int:
        """This rank's number."""
        return self._rank

    def size(self) -> int:
        """How many ranks the group has."""
        return self._boxes.size

    def post(
        self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]
    ) -> _Arrivals:
        """Copies `sends` to their peers' boxes; the handle's wait fills the buffers of `recvs`."""
        for peer, x in sends:
            self._boxes.put(
                self._rank, peer, x.detach().clone(memory_format=torch.contiguous_format)
            )
        return _Arrivals(self._boxes, self._rank, recvs)

    def all_gather(self, x: Tensor, out: Tensor) -> _Arrivals:
        """Every rank's `x` into `out` `[n, *x.shape]`."""
        everyone = range(self.size())
        return self.post([(r, x) for r in everyone], [(r, out[r]) for r in everyone])

    def reduce_scatter(self, parts: Tensor, out: Tensor) -> _Sum:
        """The sum over ranks, in rank order, of their `parts[rank]` into `out`."""
        everyone, arrived = range(self.size()), torch.empty_like(parts)
        arrivals = self.post([(r, parts[r]) for r in everyone], [(r, arrived[r]) for r in everyone])
        return _Sum(arrivals, arrived, out)

    def all_to_all(
        self, x: Tensor, out: Tensor, send_sizes: list[int], recv_sizes: list[int]
    ) -> _Arrivals:
        """Flat `x` cut by `send_sizes`, a piece a rank; `out` is made of what the others send."""
        return self.post(
            list(enumerate(x.split(send_sizes))), list(enumerate(out.split(recv_sizes)))
        )

    def share(self, mine: Any) -> list[Any]:
        """Every rank's object, in rank order."""
        for peer in range(self.size()):
            self._boxes.put(self._rank, peer, mine)
        numbers = [self._boxes.expect(src, self._rank) for src in range(self.size())]
        return [self._boxes.take(src, self._rank, n) for src, n in enumerate(numbers)]


class VirtualGroup:
    """`size` ranks in one process.

    `run` gives every rank a thread; or make the threads yourself and hand `group[r]` to the r-th
    (with `torch.autograd.set_multithreading_enabled(False)` in each that runs a backward pass).
    On CUDA all threads must use one stream.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a virtual group of {size} ranks: must be at least 1")
        self._boxes = _Boxes(size)
        self._ranks = [VirtualRank(self._boxes, rank) for rank in range(size)]

    def __len__(self) -> int:
        return len(self._ranks)

    def __getitem__(self, rank: int) -> VirtualRank:
        return self._ranks[rank]

    def abort(self, error: BaseException) -> None:
        """Makes every rank that waits, or ever waits again, raise `VirtualGroupAborted`."""
        self._boxes.abort(error)

    def run(self, fn: Callable[[VirtualRank], T]) -> list[T]:
        """`[fn(rank) for each rank]`, all ranks at once, a thread each.

        The caller's grad mode holds in the threads, and backward passes stay in them. Each call
        starts with empty boxes.

        Raises what the first failing rank raised, the others being stopped; RuntimeError where
        messages were sent that nobody received.
        """
        # Fresh, so that a run after a failed one finds no old messages.
        group = VirtualGroup(len(self))
        results: list[Any] = [None] * len(self)
        parents, grad_mode = lineage(), torch.is_grad_enabled()

        def main(rank: int) -> None:
            adopt(parents)
            try:
                with torch.set_grad_enabled(grad_mode):
                    torch.autograd.set_multithreading_enabled(False)
                    results[rank] = fn(group[rank])
            except BaseException as error:
                group.abort(error)

        threads = [
            threading.Thread(target=main, args=(rank,), name=f"virtual-rank-{rank}", daemon=True)
            for rank in range(len(self))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:
            group.abort(error)
            raise
        group.finish()
        return results

    def finish(self) -> None:
        """Raises what `abort` was given, or RuntimeError where a message was never received."""
        if self._boxes.error is not None:
            raise self._boxes.error
        if left := self._boxes.left():
            pairs = ", ".join(f"{src} to {dst}" for src, dst in sorted(set(left))[:8])
            raise RuntimeError(f"{len(left)} messages were never received: rank {pairs}")

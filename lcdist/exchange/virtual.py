"""Many ranks as threads of one process: a group for tests, laptops and traffic counts.

A message is copied when it is posted, as on a real network, and waits in the receiver's mailbox.
"""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lcdist.exchange.traffic import set_parents, thread_ancestry

T = TypeVar("T")
WAIT_SECONDS = 60.0


class VirtualGroupAborted(RuntimeError):
    """Raised on a virtual rank because another one failed; that rank's exception is the cause."""


class _Mailboxes:
    """Messages in flight, numbered per pair of `src` and `dst`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._conditions = [threading.Condition() for _ in range(size)]
        self._messages: list[dict[tuple[int, int], Any]] = [{} for _ in range(size)]
        self._num_sent: list[Counter[int]] = [Counter() for _ in range(size)]
        self._num_expected: list[Counter[int]] = [Counter() for _ in range(size)]
        self.error: BaseException | None = None

    def put(self, src: int, dst: int, message: Any) -> None:
        with self._conditions[dst]:
            number = self._num_sent[dst][src]
            self._num_sent[dst][src] += 1
            self._messages[dst][src, number] = message
            self._conditions[dst].notify_all()

    def expect(self, src: int, dst: int) -> int:
        """Return the number of the next message from `src`: messages match in order of posting."""
        with self._conditions[dst]:
            number = self._num_expected[dst][src]
            self._num_expected[dst][src] += 1
            return number

    def take(self, src: int, dst: int, number: int) -> Any:
        """Wait for a message and return it."""
        messages, condition = self._messages[dst], self._conditions[dst]
        with condition:
            in_time = condition.wait_for(
                lambda: (src, number) in messages or self.error is not None, WAIT_SECONDS
            )
            if self.error is not None:
                raise VirtualGroupAborted(f"rank {dst} stops: another rank failed: {self.error!r}")
            if not in_time:
                raise TimeoutError(
                    f"rank {dst} waited {WAIT_SECONDS:g} s for message {number} from rank {src}"
                )
            return messages.pop((src, number))

    def abort(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        for condition in self._conditions:
            with condition:
                condition.notify_all()

    def unreceived(self) -> list[tuple[int, int]]:
        """Return (src, dst) of every message that is still in a mailbox."""
        return [(src, dst) for dst, messages in enumerate(self._messages) for src, _ in messages]


class _Receives:
    """Messages to wait for, each with its receive buffer."""

    def __init__(self, boxes: _Mailboxes, rank: int, recvs: Sequence[tuple[int, Tensor]]) -> None:
        self._boxes, self._rank = boxes, rank
        self._pending = [(src, boxes.expect(src, rank), buffer) for src, buffer in recvs]

    def wait(self) -> None:
        for src, number, buffer in self._pending:
            message = self._boxes.take(src, self._rank, number)
            if message.shape != buffer.shape or message.dtype != buffer.dtype:
                raise RuntimeError(
                    f"rank {self._rank} expected {tuple(buffer.shape)} {buffer.dtype} from rank "
                    f"{src}, which sent {tuple(message.shape)} {message.dtype}"
                )
            buffer.copy_(message)
        self._pending = []


class _SummedReceives:
    """Wait for every rank's part and add the parts in rank order."""

    def __init__(self, receives: _Receives, parts: Tensor, out: Tensor) -> None:
        self._receives, self._parts, self._out = receives, parts, out

    def wait(self) -> None:
        self._receives.wait()
        self._out.copy_(self._parts[0])
        for part in self._parts[1:]:
            self._out.add_(part)


class VirtualRank:
    """One rank of a `VirtualGroup`; accepted wherever a process group is."""

    def __init__(self, boxes: _Mailboxes, rank: int) -> None:
        self._boxes, self._rank = boxes, rank

    def rank(self) -> int:
        """Return this rank's number."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks in the group."""
        return self._boxes.size

    def post(
        self, sends: Sequence[tuple[int, Tensor]], recvs: Sequence[tuple[int, Tensor]]
    ) -> _Receives:
        """Copy `sends` to their peers' mailboxes; the wait fills the buffers of `recvs`."""
        for peer, x in sends:
            self._boxes.put(
                self._rank, peer, x.detach().clone(memory_format=torch.contiguous_format)
            )
        return _Receives(self._boxes, self._rank, recvs)

    def all_gather(self, x: Tensor, out: Tensor) -> _Receives:
        """Gather every rank's `x` into `out` `[n, *x.shape]`."""
        ranks = range(self.size())
        return self.post([(r, x) for r in ranks], [(r, out[r]) for r in ranks])

    def reduce_scatter(self, parts: Tensor, out: Tensor) -> _SummedReceives:
        """Sum the ranks' `parts[rank]`, in rank order, into `out`."""
        ranks, received = range(self.size()), torch.empty_like(parts)
        receives = self.post([(r, parts[r]) for r in ranks], [(r, received[r]) for r in ranks])
        return _SummedReceives(receives, received, out)

    def all_to_all(
        self, x: Tensor, out: Tensor, send_sizes: list[int], recv_sizes: list[int]
    ) -> _Receives:
        """Send the pieces of flat `x`, one per rank; receive the other ranks' pieces in `out`."""
        return self.post(
            list(enumerate(x.split(send_sizes))), list(enumerate(out.split(recv_sizes)))
        )

    def all_gather_object(self, obj: Any) -> list[Any]:
        """Return every rank's object, in rank order."""
        for peer in range(self.size()):
            self._boxes.put(self._rank, peer, obj)
        numbers = [self._boxes.expect(src, self._rank) for src in range(self.size())]
        return [self._boxes.take(src, self._rank, n) for src, n in enumerate(numbers)]


class VirtualGroup:
    """`size` ranks in one process.

    `run` gives every rank a thread. Alternatively, make the threads yourself and pass `group[r]` to
    the r-th; each thread that runs a backward pass then needs
    `torch.autograd.set_multithreading_enabled(False)`. On CUDA all threads must use one stream.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a virtual group of {size} ranks: must be at least 1")
        self._boxes = _Mailboxes(size)
        self._ranks = [VirtualRank(self._boxes, rank) for rank in range(size)]

    def __len__(self) -> int:
        return len(self._ranks)

    def __getitem__(self, rank: int) -> VirtualRank:
        return self._ranks[rank]

    def abort(self, error: BaseException) -> None:
        """Make every rank that waits, now or later, raise `VirtualGroupAborted`."""
        self._boxes.abort(error)

    def run(self, fn: Callable[[VirtualRank], T]) -> list[T]:
        """Return `[fn(rank) for each rank]`, running all ranks at once, each in a thread.

        The caller's grad mode holds in the threads, and backward passes stay in them. Each call
        starts with empty mailboxes.

        Raises:
            Exception: the first failing rank's exception; the other ranks are stopped.
            RuntimeError: some messages were sent but never received.
        """
        # Fresh, so that a run after a failed one finds no old messages.
        group = VirtualGroup(len(self))
        results: list[Any] = [None] * len(self)
        parents, grad_mode = thread_ancestry(), torch.is_grad_enabled()

        def main(rank: int) -> None:
            set_parents(parents)
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
        """Raise the error given to `abort`, or RuntimeError if a message was never received."""
        if self._boxes.error is not None:
            raise self._boxes.error
        if unreceived := self._boxes.unreceived():
            pairs = ", ".join(f"{src} to {dst}" for src, dst in sorted(set(unreceived))[:8])
            raise RuntimeError(f"{len(unreceived)} messages were never received: rank {pairs}")

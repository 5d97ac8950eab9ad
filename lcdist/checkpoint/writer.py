"""Make Megatron's checkpoint writer use threads of this process.

Megatron forks a process for each file and collects results through a queue that another process
serves. A forked writer waits for ever if its rank is killed, and keeps the run folder's lock. The
queue's server ends with the SIGTERM that torchrun sends to the process group, and then the last
save fails. Threads write as fast, since writing releases the interpreter lock, and end with their
process. They also hash what they write. Checked with megatron-core 0.16.1.
"""

import io
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.utils.digests import HashingWriter
from megatron.core.dist_checkpointing.strategies import filesystem_async


def write_with_threads() -> None:
    """Make `dist_checkpointing.save` start no process from now on; repeated calls do nothing."""
    filesystem_async._get_write_results_queue = queue.Queue


class _Hashed:
    """A transformation of torch's writer that leaves the bytes as they are and hashes them."""

    def __init__(self) -> None:
        self.writer: HashingWriter | None = None

    def transform_save_stream(self, item: Any, stream: Any) -> tuple[Any, list[str]]:
        """Return the stream to write to, and no name of a transformation to note.

        It is the same for all tensors of a file, so that the digest is the file's.
        """
        self.writer = self.writer or HashingWriter(stream)
        return _StaysOpen(self.writer), []


class _StaysOpen(io.RawIOBase):
    """A stream that torch closes after each tensor of a file."""

    def __init__(self, stream: HashingWriter) -> None:
        super().__init__()
        self._stream = stream

    def write(self, data: Any) -> int:
        """Write to the stream."""
        return self._stream.write(data)

    def close(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def write_buckets(buckets: Sequence[Any], results: queue.Queue, digests: dict[str, str]) -> None:
    """Write each bucket to a file in a thread.

    Args:
        buckets: Megatron's, as `copy_to_host` returns them.
        results: gets their results, or the first error, as from Megatron's
            `write_preloaded_data_multiproc`.
        digests: gets the SHA-256 of each file by its name.
    """

    def write(number: int) -> Any:
        # Megatron annotates these as queues between processes; threads need none.
        answer: Any = queue.Queue()
        counter: Any = queue.Queue()
        counter.put(number)
        hashed: Any = _Hashed()
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            [hashed], number, buckets[number], answer, counter, use_fsync=True
        )
        if hashed.writer is not None:
            digests[Path(buckets[number][0]).name] = hashed.writer.digest()
        return answer.get()[1]

    with ThreadPoolExecutor(len(buckets)) as pool:
        writes = [pool.submit(write, number) for number in range(len(buckets))]
    raised = [error for error in (each.exception() for each in writes) if error is not None]
    # Megatron's writer may also return an error instead of raising it.
    outcomes = raised or [each.result() for each in writes]
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    results.put(errors[0] if errors else dict(enumerate(outcomes)))


def copy_to_host(buckets: Sequence[Any], copy_host_tensors: bool) -> list[Any]:
    """Return Megatron's buckets with all tensors in host memory.

    copy_host_tensors: copy tensors that are already there too. They are the parameters themselves,
    which the next step overwrites.
    """

    def on_host(x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return x.detach().to("cpu")
        return x.detach().clone() if copy_host_tensors else x

    return [
        (*names, (written, [(item, on_host(x)) for item, x in tensors]))
        for *names, (written, tensors) in buckets
    ]

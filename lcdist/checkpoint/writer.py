"""Megatron's checkpoint writer, kept to this process.

As it comes, it forks a copy of the process for each file and collects their results through a
queue that yet another process serves. A copy whose rank is killed waits for ever and keeps the run
folder's lock; the queue's server ends with a SIGTERM to the process group, as torchrun sends it,
and then the last save fails. Threads write as fast, since writing holds no lock of the interpreter,
and end with their process. Checked with megatron-core 0.16.1.
"""

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from megatron.core.dist_checkpointing.strategies import filesystem_async


def write_in_this_process() -> None:
    """From now on `dist_checkpointing.save` starts no process; twice is the same as once."""
    writer: Any = filesystem_async.FileSystemWriterAsync
    writer.write_preloaded_data_multiproc = staticmethod(_write)
    filesystem_async._get_write_results_queue = queue.Queue


def _write(
    transforms: list[Any], use_msc: bool, rank: int, buckets: Sequence[Any], results: queue.Queue
) -> None:
    """One file a bucket, each by a thread; their results, or the first error, into `results`."""

    def write(number: int) -> Any:
        # The annotations ask for queues between processes; threads need none.
        answer: Any = queue.Queue()
        counter: Any = queue.Queue()
        counter.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, buckets[number], answer, counter, use_fsync=True, use_msc=use_msc
        )
        return answer.get()[1]

    with ThreadPoolExecutor(len(buckets)) as pool:
        writes = [pool.submit(write, number) for number in range(len(buckets))]
    raised = [error for error in (one.exception() for one in writes) if error is not None]
    # Megatron's own way to tell of an error is to return it.
    told = raised or [one.result() for one in writes]
    errors = [outcome for outcome in told if isinstance(outcome, BaseException)]
    results.put(errors[0] if errors else dict(enumerate(told)))


def staged(buckets: Sequence[Any], own: bool) -> list[Any]:
    """Megatron's buckets with their tensors in the host's memory.

    own: what lies there already is copied too, since it is the parameters themselves, which the
    next step overwrites.
    """

    def on_host(x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu:
            return x.detach().to("cpu")
        return x.detach().clone() if own else x

    return [
        (*names, (written, [(item, on_host(x)) for item, x in tensors]))
        for *names, (written, tensors) in buckets
    ]

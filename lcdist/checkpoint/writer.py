"""Make Megatron's checkpoint writer use threads of this process.

Megatron forks a process for each file and collects results through a queue that another process
serves. A forked writer waits for ever if its rank is killed, and keeps the run folder's lock. The
queue's server ends with the SIGTERM that torchrun sends to the process group, and then the last
save fails. Threads write as fast, since writing releases the interpreter lock, and end with their
process. Checked with megatron-core 0.16.1.
"""

import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from megatron.core.dist_checkpointing.strategies import filesystem_async


def write_with_threads() -> None:
    """Make `dist_checkpointing.save` start no process from now on; repeated calls do nothing."""
    writer: Any = filesystem_async.FileSystemWriterAsync
    writer.write_preloaded_data_multiproc = staticmethod(_write_buckets)
    filesystem_async._get_write_results_queue = queue.Queue


def _write_buckets(
    transforms: list[Any], use_msc: bool, rank: int, buckets: Sequence[Any], results: queue.Queue
) -> None:
    """Write each bucket to a file in a thread; put their results or the first error in `results`.

    The signature is that of Megatron's `write_preloaded_data_multiproc`.
    """

    def write(number: int) -> Any:
        # Megatron annotates these as queues between processes; threads need none.
        answer: Any = queue.Queue()
        counter: Any = queue.Queue()
        counter.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, buckets[number], answer, counter, use_fsync=True, use_msc=use_msc
        )
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

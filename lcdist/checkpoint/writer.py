"""Start Megatron's checkpoint writer, and write with threads of this process.

Megatron-core 0.16.1 forks a process for each file. A forked writer waits for ever if its rank is
killed, and keeps the run folder's lock. 0.19 writes with threads, but ends without a result if one
of them fails. Both collect results through a queue that another process serves, which ends with the
SIGTERM that torchrun sends to the process group; then the last save fails. Threads write as fast,
since writing releases the interpreter lock, and end with their process. They can also hash what
they write.

What is written is the same with both, and both load it. Of its own, 0.19 would put what is no
tensor among the tensors, as bytes to be unpickled, and would write in the background with another
package.
"""

import inspect
import io
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.utils.digests import HashingWriter
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

_FORMAT = "torch_dist", 1
# Megatron-core 0.19 has a second writer, of another package, and takes it unless told otherwise.
_ASYNC_OPTIONS = inspect.signature(TorchDistSaveShardedStrategy.async_save).parameters
_OWN_WRITER = {"async_strategy": "mcore"} if "async_strategy" in _ASYNC_OPTIONS else {}
# In Megatron-core 0.16.1 and in 0.19.
_QUEUE_NAMES = "_get_write_results_queue", "get_write_results_queue"


def start_save(state: dict[str, Any], folder: Path) -> Any:
    """Return Megatron's request to write the sharded `state` into the empty `folder`.

    All ranks call it. They write what its `async_fn_args` hold, then call each of its
    `finalize_fns`.
    """
    tensors, rest = save_preprocess(state)
    if dist.get_rank() == 0:
        write_rest(rest, folder)
    strategy = TorchDistSaveShardedStrategy(*_FORMAT, thread_count=2)
    # As text: torch pickles it into the metadata, which must not name the class Path.
    request = strategy.async_save(tensors, str(folder), **_OWN_WRITER)  # pyright: ignore[reportArgumentType]
    request.finalize_fns.append(partial(_finish, folder))
    return request


def _finish(folder: Path) -> None:
    if dist.get_rank() == 0:
        write_format(folder)
    dist.barrier()


def write_rest(rest: Mapping[str, Any], folder: Path) -> None:
    """Write the part of a state that is no tensor: here names without anything under them."""
    torch.save(rest, folder / COMMON_STATE_FNAME)


def write_format(folder: Path) -> None:
    """Write the file by which Megatron recognises the format of a complete checkpoint."""
    save_config(CheckpointingConfig(*_FORMAT), str(folder))


def start_no_process() -> None:
    """Make `start_save` start no process from now on; repeated calls do nothing."""
    [name] = [name for name in _QUEUE_NAMES if hasattr(filesystem_async, name)]
    setattr(filesystem_async, name, queue.Queue)


class _Unchanged:
    """A transformation of torch's writer that leaves the bytes as they are, and may hash them."""

    def __init__(self, hashes: bool) -> None:
        self._hashes = hashes
        self.writer: HashingWriter | None = None

    def transform_save_stream(self, item: Any, stream: Any) -> tuple[Any, list[str]]:
        """Return the stream to write to, and no name of a transformation to note.

        It is the same for all tensors of a file, so that the digest is the file's.
        """
        if not self._hashes:
            return _StaysOpen(stream), []
        self.writer = self.writer or HashingWriter(stream)
        return _StaysOpen(self.writer), []


class _StaysOpen(io.RawIOBase):
    """A stream that torch closes after each tensor of a file."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def write(self, data: Any) -> int:
        """Write to the stream."""
        return self._stream.write(data)

    def close(self) -> None:
        """Flush the stream."""
        self._stream.flush()


def write_buckets(
    buckets: Sequence[Any], results: queue.Queue, digests: dict[str, str] | None
) -> None:
    """Write each bucket to a file in a thread.

    Args:
        buckets: Megatron's, as `copy_to_host` returns them.
        results: gets their results, or the first error, as from `async_fn` of Megatron's request.
        digests: gets the SHA-256 of each file by its name; None: nothing is hashed.
    """

    def write(number: int) -> Any:
        # Megatron annotates these as queues between processes; threads need none.
        answer: Any = queue.Queue()
        counter: Any = queue.Queue()
        counter.put(number)
        hashed: Any = _Unchanged(hashes=digests is not None)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            [hashed], number, buckets[number], answer, counter, use_fsync=True
        )
        if digests is not None and hashed.writer is not None:
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

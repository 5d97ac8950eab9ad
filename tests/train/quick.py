"""Saving without the seconds that Megatron's first save of a process takes."""

import queue
from typing import Any

import lcdist.host  # noqa: F401
from megatron.core.dist_checkpointing.strategies import filesystem_async


def save_quickly() -> None:
    """For the rest of this process: a plain queue in place of one served by a spawned process.

    The queue only serves saves that go on in the background, which lcdist's do not.
    """
    results: queue.Queue[Any] = queue.Queue()
    filesystem_async._get_write_results_queue = lambda: results

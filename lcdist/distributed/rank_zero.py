"""Actions that rank 0 takes for all ranks.

An error on rank 0 is raised on every rank, so that no rank waits for one that has given up.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from lcdist.utils.errors import mark_of_rank_zero

_T = TypeVar("_T")


def run_on_rank_zero(fn: Callable[[], _T]) -> _T:
    """Call `fn` on rank 0 and return its result on every rank; all ranks call this together.

    The result, or the OSError or ValueError that `fn` raised, must be picklable.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = fn()
        except (OSError, ValueError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        mark_of_rank_zero(error)
        raise error
    return result


@contextlib.contextmanager
def enter_on_rank_zero(context: contextlib.AbstractContextManager[None]) -> Iterator[None]:
    """Hold `context` on rank 0 during the block; all ranks call this together.

    An OSError or ValueError on entering it is raised on every rank.
    """
    with contextlib.ExitStack() as stack:
        run_on_rank_zero(lambda: stack.enter_context(context))
        yield

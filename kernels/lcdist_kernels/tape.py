"""Results that the second run of a function takes from the first, for activation checkpointing.

A recomputed layer runs twice: forward without gradients, and again in backward. Attention is most
of that second run at long lengths, and its backward needs little of it: out and lse. So each
attention's autograd function wraps its forward in `kept`, which stores the results in the first run
and returns them in the second. There the function builds its node without computing or sending
anything. Without a tape `kept` only calls.

The order of calls is the key, so both runs must make the same ones.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

Results = tuple[Any, ...]


class Tape:
    """Results of one run, in the order of the calls of `kept`."""

    def __init__(self) -> None:
        self._results: list[Results] = []

    def append(self, results: Results) -> None:
        """Add the results of one call."""
        self._results.append(results)

    def release(self) -> list[Tensor]:
        """Return the tensors among the results and drop them: the caller stores them."""
        tensors = [x for results in self._results for x in results if isinstance(x, Tensor)]
        self._results = [
            tuple(_STORED if isinstance(x, Tensor) else x for x in results)
            for results in self._results
        ]
        return tensors

    def results(self, tensors: Sequence[Tensor]) -> Iterator[Results]:
        """Yield the results of each call; tensors: what `release` returned."""
        stored = iter(tensors)
        for results in self._results:
            # Detached: autograd writes on what a function returns.
            yield tuple(next(stored).detach() if x is _STORED else x for x in results)


# Stands for a tensor that was released.
_STORED = object()
# A tape that records, results that are replayed, or neither.
_TAPE: ContextVar[Tape | Iterator[Results] | None] = ContextVar("tape", default=None)


@contextmanager
def record() -> Iterator[Tape]:
    """Record the results of `kept` inside the block, in this thread."""
    tape = Tape()
    with _using(tape):
        yield tape


@contextmanager
def replay(tape: Tape, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Let `kept` return what was recorded inside the block, in this thread.

    Args:
        tape: a released tape.
        tensors: its tensors.

    Raises:
        RuntimeError: the block ends before all results are taken.
    """
    results = tape.results(tensors)
    with _using(results):
        yield
    if next(results, None) is not None:
        raise RuntimeError("the second run of a layer made fewer calls of attention than the first")


@contextmanager
def _using(tape: Tape | Iterator[Results] | None) -> Iterator[None]:
    token = _TAPE.set(tape)
    try:
        yield
    finally:
        _TAPE.reset(token)


def records() -> bool:
    """Return whether results are recorded: a second run will need gradients of them."""
    return isinstance(_TAPE.get(), Tape)


def replays() -> bool:
    """Return whether `kept` computes nothing, so that its inputs need not be made."""
    tape = _TAPE.get()
    return tape is not None and not isinstance(tape, Tape)


def kept(compute: Callable[[], Iterable[Any]]) -> Results:
    """Return what `compute` returns, as a tuple; in the second run of a layer, what it returned.

    Args:
        compute: returns tensors without gradients, and objects that hold few bytes. Calls of `kept`
            inside it record nothing of their own.

    Raises:
        RuntimeError: a second run makes more calls than the first.
    """
    tape = _TAPE.get()
    if tape is None:
        return tuple(compute())
    if isinstance(tape, Tape):
        with _using(None):
            results = tuple(compute())
        tape.append(results)
        return results
    results = next(tape, None)
    if results is None:
        raise RuntimeError("the second run of a layer made more calls of attention than the first")
    return results


class AttentionPass(Protocol):
    """Attention whose gradients are written by hand."""

    def fwd(self, *inputs: Tensor) -> Sequence[Tensor]:
        """Return out, then what else of the pass the gradients need."""
        ...

    def bwd(
        self, dout: Tensor, inputs: Sequence[Tensor], results: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Return the gradient of each input. results: what `fwd` returned."""
        ...


class KeptPass(torch.autograd.Function):
    """An `AttentionPass`, then its inputs, to out; saves the inputs and all results of the pass."""

    @staticmethod
    def forward(node: Any, attention: AttentionPass, *inputs: Tensor) -> Tensor:
        results = kept(lambda: attention.fwd(*inputs))
        node.save_for_backward(*inputs, *results)
        node.attention, node.num_inputs = attention, len(inputs)
        return results[0]

    @staticmethod
    def backward(node: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        # Read once: each reading may copy or compute the tensors again.
        saved, count = node.saved_tensors, node.num_inputs
        return None, *node.attention.bwd(dout, saved[:count], saved[count:])

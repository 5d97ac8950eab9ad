"""The two engine protocols: all that training, evaluation and tests know of an engine.

An engine owns this rank's part of the model and runs it over the mesh. Only an engine touches model
chunks, gradient buffers and the optimizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lcdist.data.loader import Batch
from lcdist.layout import ContextLayout


class RefusedStepError(FloatingPointError):
    """A step's loss or a gradient is not finite, or no token has a loss: no weight was changed.

    Args:
        reason: what was found.
        ranks: global ranks where it was found; empty where that is not known.
        parameters: names of parameters whose gradient is not finite.
    """

    SHOWN = 6

    def __init__(
        self, reason: str, ranks: Sequence[int] = (), parameters: Sequence[str] = ()
    ) -> None:
        super().__init__(reason, ranks, parameters)
        self.reason, self.ranks, self.parameters = reason, ranks, parameters

    def __str__(self) -> str:
        parts = [self.reason]
        if self.ranks:
            number = "rank" if len(self.ranks) == 1 else "ranks"
            parts.append(f"on {number} {_some(self.ranks, self.SHOWN)}")
        if self.parameters:
            names = _some(self.parameters, self.SHOWN)
            parts.append(f"parameters with non-finite gradients: {names}")
        return "; ".join(parts)


class NoTargetError(RefusedStepError):
    """No token of a step is to be predicted, so there is nothing to learn from it."""

    def __init__(self) -> None:
        super().__init__("no token of this step has a loss")


def _some(items: Sequence[object], count: int) -> str:
    """Return the first items as text, and how many more there are."""
    text = ", ".join(str(item) for item in items[:count])
    return text if len(items) <= count else f"{text} and {len(items) - count} more"


@dataclass(frozen=True)
class StepLoss:
    """The loss of some micro-batches over all ranks; the same on every rank.

    mean: nats a token, 0.0 without tokens.
    tokens: tokens with a loss, over all ranks.
    """

    mean: float
    tokens: int


class PendingLoss:
    """The loss of a training step, as `StepLoss`, which is read when it is first asked for.

    Reading waits for the device and for the other ranks, which have to read too. After
    `TrainEngine.step`, which reads it with the gradient norm, it costs nothing.

    Args:
        read: returns the loss over all ranks.
    """

    def __init__(self, read: Callable[[], StepLoss]) -> None:
        self._read = read
        self._value: StepLoss | None = None

    def settle(self, value: StepLoss) -> None:
        """Take over a loss that was read elsewhere."""
        self._value = value

    @property
    def value(self) -> StepLoss:
        """The loss over all ranks."""
        if self._value is None:
            self._value = self._read()
        return self._value

    @property
    def mean(self) -> float:
        """Nats a token; see `StepLoss`."""
        return self.value.mean

    @property
    def tokens(self) -> int:
        """Tokens with a loss, over all ranks."""
        return self.value.tokens


class ForwardEngine(Protocol):
    """Forward passes over any mesh: weights alone, no gradient buffers and no optimizer state."""

    def evaluate(self, batches: Sequence[Batch], layout: ContextLayout, seqlen: int) -> StepLoss:
        """Return the loss of all ranks' batches, without gradients.

        Args:
            batches: this rank's micro-batches, on its device.
            layout: how their sequences are cut over the context-parallel ranks.
            seqlen: tokens of their sequences without the layout's padding.
        """
        ...

    def token_losses(self, batches: Sequence[Batch], layout: ContextLayout, seqlen: int) -> Tensor:
        """Return the loss of every token of all ranks' batches, without gradients.

        Args: as of `evaluate`.

        Returns:
            Nats, float64 `[batches, b dp_size, layout.seqlen]` on the CPU, the same on every rank:
            rows in the order of data-parallel ranks, tokens in their order in the text. Tokens
            that the loss mask leaves out have a loss as well.
        """
        ...

    def state_dict(self, weights_only: bool = False) -> dict[str, Any]:
        """Return this rank's state as Megatron's sharded tensors, to save or to load into.

        The key "model" holds the weights. A training engine adds its optimizer state under
        "optimizer", unless `weights_only`.
        """
        ...

    def load_state(self, loaded: dict[str, Any], steps_taken: int = 0) -> None:
        """Take over state loaded in the shape that `state_dict` returned.

        Args:
            loaded: weights, and the optimizer state where there is one.
            steps_taken: optimizer steps behind the loaded state.
        """
        ...


class TrainEngine(ForwardEngine, Protocol):
    """A forward engine that also computes gradients and updates the weights."""

    @property
    def seconds_before_reduction(self) -> float:
        """Seconds of the last forward and backward until gradients were summed over ranks."""
        ...

    def forward_backward(
        self, batches: Sequence[Batch], while_waiting: Callable[[], None] | None = None
    ) -> PendingLoss:
        """Compute the gradients of the mean loss over all tokens of all ranks' batches.

        Args:
            batches: this rank's micro-batches, on its device.
            while_waiting: called once, when the step's work is queued and its loss not yet read.
        """
        ...

    def step(self, lr: float) -> float:
        """Update the weights at learning rate `lr`; return the gradient norm before clipping.

        Raises RefusedStepError on all ranks, before any weight changes, if the loss or a gradient
        is not finite or no token has a loss.
        """
        ...

    def gradient(self, name: str) -> Tensor:
        """Return this rank's part of a gradient in fp32, by the parameter's whole-model name.

        It is that of the mean loss over all ranks, before clipping. Ranks that hold the parameter
        call together. Raises KeyError if this rank does not train it.
        """
        ...

    def load_adapter(self, tensors: Mapping[str, Callable[[], Tensor]]) -> None:
        """Replace the weights that `tensors` names.

        Args:
            tensors: by whole-model name, a function that reads the whole tensor. It is called only
                where this rank holds a part of it.
        """
        ...

    def weights_changed(self) -> None:
        """Copy the weights into the optimizer's fp32 masters after a change from outside."""
        ...

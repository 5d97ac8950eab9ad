"""An exchange under way: posted at once, waited for later, forward and backward.

Two autograd nodes make one exchange. Forward, the first posts and the second waits; backward, the
second posts the adjoint and the first waits for it, so that what a method computes between `shift`
and `wait` hides the exchange in both directions.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Arrival: TypeAlias = Callable[[], Tensor]
"""Waits, then gives the tensor."""

Post: TypeAlias = Callable[[Tensor], Arrival]
"""Posts an exchange of its argument."""


class _Course:
    """A linear exchange, its adjoint, and what is under way of either."""

    def __init__(self, forward: Post, adjoint: Post) -> None:
        self.forward, self.adjoint = forward, adjoint
        self.under_way: Arrival | None = None

    def arrive(self) -> Tensor:
        assert self.under_way is not None, "nothing was posted"
        arrival, self.under_way = self.under_way, None
        return arrival()


class _Leave(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, course: _Course) -> Tensor:
        ctx.course = course
        course.under_way = course.forward(x)
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.course.arrive(), None


class _Arrive(Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, course: _Course) -> Tensor:
        ctx.course = course
        return course.arrive()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dout,) = grads
        ctx.course.under_way = ctx.course.adjoint(dout)
        return dout.new_zeros(()), None


class Pending:
    """An exchange that is under way.

    The result must enter the loss even where it has no elements (concatenate it): a rank's part in
    the backward exchange hangs on it.
    """

    def __init__(self, x: Tensor, forward: Post, adjoint: Post) -> None:
        self._course = _Course(forward, adjoint)
        self._ticket = _Leave.apply(x, self._course)
        self._result: Tensor | None = None

    def wait(self) -> Tensor:
        """What was exchanged; differentiable in what was given. The same tensor at every call."""
        if self._result is None:
            self._result = _Arrive.apply(self._ticket, self._course)
        assert self._result is not None
        return self._result

"""Exchanges that are posted now and waited for later, in the forward and in the backward pass.

An exchange is two autograd nodes. Forward, the first node posts and the second waits. Backward,
the second node posts the adjoint and the first waits for it. Computation between `shift` and
`wait` therefore overlaps with the exchange in both passes.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

WaitFn: TypeAlias = Callable[[], Tensor]
"""Wait for the exchange and return its result."""

PostFn: TypeAlias = Callable[[Tensor], WaitFn]
"""Post an exchange of the argument."""


class _InFlight:
    """A linear exchange and its adjoint, and the wait function of whichever is in flight."""

    def __init__(self, forward: PostFn, adjoint: PostFn) -> None:
        self.forward, self.adjoint = forward, adjoint
        self.wait_fn: WaitFn | None = None

    def wait(self) -> Tensor:
        assert self.wait_fn is not None, "nothing was posted"
        wait_fn, self.wait_fn = self.wait_fn, None
        return wait_fn()


class _PostOp(Function):
    """First node: posts the exchange in forward, waits for the adjoint in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, in_flight: _InFlight) -> Tensor:
        ctx.in_flight = in_flight
        in_flight.wait_fn = in_flight.forward(x)
        return x.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.in_flight.wait(), None


class _WaitOp(Function):
    """Second node: waits for the exchange in forward, posts the adjoint in backward."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, in_flight: _InFlight) -> Tensor:
        ctx.in_flight = in_flight
        return in_flight.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dout,) = grads
        ctx.in_flight.wait_fn = ctx.in_flight.adjoint(dout)
        return dout.new_zeros(()), None


class Pending:
    """An exchange in flight.

    The result must enter the loss even if it has no elements (concatenate it): otherwise this
    rank's backward pass skips the adjoint exchange, which the other ranks wait for.

    Args:
        x: tensor to exchange.
        forward: posts the exchange of `x`.
        adjoint: posts the adjoint exchange of the result's gradient.
    """

    def __init__(self, x: Tensor, forward: PostFn, adjoint: PostFn) -> None:
        self._in_flight = _InFlight(forward, adjoint)
        # Connects the two nodes in the graph; its value is unused.
        self._token = _PostOp.apply(x, self._in_flight)
        self._result: Tensor | None = None

    @property
    def adjoint(self) -> PostFn:
        """The function that posts the adjoint exchange of the result's gradient."""
        return self._in_flight.adjoint

    def wait(self) -> Tensor:
        """Return the result, differentiable in the input; the same tensor at every call."""
        if self._result is None:
            self._result = _WaitOp.apply(self._token, self._in_flight)
        assert self._result is not None
        return self._result

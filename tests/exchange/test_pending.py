"""shift, gather and swap post at the call and wait once, in both passes."""

import pytest
import torch

from lcdist.exchange import VirtualGroup, gather, shift, swap
from lcdist.exchange.pending import Pending

VERBS = {
    "shift": lambda x, g: shift(x, [(0, 1, 0, 1), (1, 0, 1, 2)], g),
    "gather": lambda x, g: gather(x, g),
    "swap": lambda x, g: swap(x, 1, 2, g),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_exchange_is_posted_at_the_call(verb, needs_grad):
    # One thread runs both ranks: an exchange posted only at the wait would wait for itself.
    group = VirtualGroup(2)
    x = torch.ones(2, 4, 6, requires_grad=needs_grad)
    pending = [VERBS[verb](x, group[r]) for r in range(2)]
    for p in pending:
        assert not p.wait().isnan().any()
        assert p.wait() is p.wait()


@pytest.mark.parametrize("verb", VERBS)
def test_adjoint_is_posted_before_the_computation_in_between(verb):

    class Compute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, events):
            ctx.events = events
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            ctx.events.append("compute")
            return grads[0], None

    def order(rank):
        events = []
        x = torch.ones(2, 4, 6, requires_grad=True)
        pending = VERBS[verb](x, rank)
        in_flight = pending._in_flight
        adjoint = in_flight.adjoint

        def recorded_adjoint(dout):
            events.append("post")
            wait_fn = adjoint(dout)

            def recorded_wait():
                events.append("wait")
                return wait_fn()

            return recorded_wait

        in_flight.adjoint = recorded_adjoint
        computed = Compute.apply(x, events)
        (computed.sum() + pending.wait().sum()).backward()
        return events

    assert VirtualGroup(2).run(order) == [["post", "compute", "wait"]] * 2


def test_backward_can_run_twice():
    def grads(rank):
        x = torch.ones(1, 2, 2, requires_grad=True)
        out = gather(x, rank).wait()
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        return x.grad.unique().tolist()

    assert VirtualGroup(3).run(grads) == [[6.0]] * 3


def test_no_grad_builds_no_graph():
    x = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        pending = Pending(x, lambda x: lambda: 2 * x, lambda dout: lambda: 2 * dout)
        assert not pending.wait().requires_grad

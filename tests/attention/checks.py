"""Checks that the tests of several methods share."""

from typing import Any

import torch

from lcdist.attention import Shape, Traffic
from lcdist.exchange import VirtualGroup, group_rank, traffic
from tests.attention.body import Problem, assert_all_match, on_virtual_ranks, whole


def assert_ranks_equal_reference(problem: Problem) -> None:
    """Assert that both implementations on virtual ranks give the results of the whole sequence."""
    truth = whole(problem)
    for impl in ("reference", "torch"):
        assert_all_match(on_virtual_ranks(problem, impl)[0], truth)


def assert_documents_of_one_token_return_values(problem: Problem) -> None:
    """Assert that a token that sees only itself returns its value, without other gradients."""
    problem.cu_seqlens = torch.arange(problem.layout.seqlen + 1, dtype=torch.int32)
    groups = problem.dout.unflatten(2, (2, 2)).sum(3)
    for impl in ("reference", "torch"):
        out, dq, dk, dv = on_virtual_ranks(problem, impl)[0]
        assert_all_match([out, dv], [problem.qkv[2].repeat_interleave(2, 2), groups])
        assert dq.abs().max() < 1e-12 and dk.abs().max() < 1e-12


def sent_and_planned(problem: Problem, impl: str) -> tuple[Traffic, Traffic]:
    """Return the bytes that an implementation sent, and those that the method's `bytes` gives."""
    q, k = problem.qkv[:2]
    shape = Shape(len(q), q.shape[2], k.shape[2], q.shape[3], q.element_size())
    planned = problem.method.bytes(problem.options, shape, problem.layout)
    return on_virtual_ranks(problem, impl)[1], planned


def assert_evaluation_sends_what_training_sends(problem: Problem) -> None:
    """Assert that a forward pass without gradients sends what one with gradients sends."""

    def forward(rank: Any) -> int:
        qkv = [problem.layout.shard(x, group_rank(rank), 1) for x in problem.qkv]
        with torch.no_grad(), traffic() as sent:
            problem.method.attention(*qkv, layout=problem.layout, group=rank, **problem.keywords())
        return sent.total

    sent = VirtualGroup(problem.layout.cp_size).run(forward)
    assert tuple(sent) == on_virtual_ranks(problem, "torch")[1].forward

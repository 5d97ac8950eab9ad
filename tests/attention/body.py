"""The body of every method's tests: made-up inputs, a run on all ranks, the comparison."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor

from lcdist.attention import METHODS, AttentionMethod, Traffic
from lcdist.exchange import Group, VirtualGroup, group_rank, traffic
from lcdist.layout import ContextLayout, pieces_needed
from lcdist_kernels import Rotary
from tests.tolerance import assert_matches


@dataclass
class Problem:
    """A whole sequence and what is asked of it; the same on every rank. Pickled by value."""

    name: str
    options: Any
    layout: ContextLayout
    qkv: list[Tensor]
    dout: Tensor
    cu_seqlens: Tensor | None = None
    inv_freq: Tensor | None = None
    softmax_scale: float | None = None

    @property
    def method(self) -> AttentionMethod:
        return METHODS[self.name]

    def asked(self) -> dict[str, Any]:
        rotary = None if self.inv_freq is None else Rotary(self.inv_freq, 1.1)
        return {
            "options": self.options,
            "rotary": rotary,
            "cu_seqlens": self.cu_seqlens,
            "softmax_scale": self.softmax_scale,
        }


def borders(layout: ContextLayout) -> Tensor:
    """Documents over the borders of shards, one of one token, an empty one, a padded last shard."""
    filled = layout.seqlen - layout.local_seqlen if layout.cp_size > 1 else layout.seqlen - 3
    inner = {1, filled // 3, filled // 2 + 1}
    return torch.tensor(sorted([0, filled // 3, *inner, filled]), dtype=torch.int32)


def make(
    name: str,
    kind: str,
    cp_size: int,
    *,
    packed: bool = False,
    at_least: int = 45,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """A problem with random inputs, on the shortest sequence of `at_least` tokens that fits."""
    method = METHODS[name]
    options = method.options()
    own = method.multiple_of(options, cp_size, kind)
    step = lcm(pieces_needed(kind, cp_size), own)
    layout = ContextLayout(kind, -(-at_least // step) * step, cp_size, own)
    head_dim = 16
    q, k, v, dout = (
        torch.randn(2, layout.seqlen, n, head_dim, dtype=torch.float64).to(dtype)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    cu_seqlens = borders(layout) if packed else None
    return Problem(name, options, layout, [q, k, v], dout, cu_seqlens, inv_freq, 0.3)


def whole(problem: Problem) -> list[Tensor]:
    """[out, dq, dk, dv] of the reference."""
    qkv = [x.detach().requires_grad_() for x in problem.qkv]
    out = problem.method.reference(*qkv, **problem.asked())
    return [out.detach(), *torch.autograd.grad(out, qkv, problem.dout.to(out.dtype))]


def on_a_rank(problem: Problem, group: Group, impl: str) -> tuple[list[Tensor], Traffic]:
    """This rank's [out, dq, dk, dv], and the bytes it sent forward and backward."""
    layout, rank = problem.layout, group_rank(group)
    qkv = [layout.shard(x, rank, 1).requires_grad_() for x in problem.qkv]
    with traffic() as forward:
        out = problem.method.attention(
            *qkv, layout=layout, group=group, impl=impl, **problem.asked()
        )
    with traffic() as backward:
        grads = torch.autograd.grad(out, qkv, layout.shard(problem.dout, rank, 1))
    return [out.detach(), *grads], Traffic((forward.total,), (backward.total,))


def joined(problem: Problem, shards: Sequence[list[Tensor]]) -> list[Tensor]:
    """[out, dq, dk, dv] of the whole sequence from every rank's."""
    return [problem.layout.unshard(parts, 1) for parts in zip(*shards, strict=True)]


def on_virtual_ranks(problem: Problem, impl: str) -> tuple[list[Tensor], Traffic]:
    """[out, dq, dk, dv] of the whole sequence, and the bytes rank by rank."""
    group = VirtualGroup(problem.layout.cp_size)
    ranks = group.run(lambda rank: on_a_rank(problem, rank, impl))
    sent = [counted for _, counted in ranks]
    by_rank = Traffic(tuple(t.forward[0] for t in sent), tuple(t.backward[0] for t in sent))
    return joined(problem, [tensors for tensors, _ in ranks]), by_rank


def assert_all_match(actual: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """out, dq, dk, dv: the same maths."""
    for a, r in zip(actual, reference, strict=True):
        assert_matches(a, r)

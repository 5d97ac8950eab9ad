"""Helpers of the method tests: random problems, runs on all ranks, comparisons."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import lcm
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.attention import METHODS, AttentionMethod, HeadSlice, Traffic
from lcdist.exchange import Group, VirtualGroup, group_rank, traffic
from lcdist.layout import ContextLayout, pieces_needed
from lcdist_kernels import Rotary
from tests.tolerance import assert_matches

# Small sizes, none a divisor of another, so that a short sequence has every kind of border.
VARIANTS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "full": ({}, {"length_scale": 5}),
    "coca": ({}, {"variant": "strict"}),
    "lssar": ({}, {"reweight": False}),
    "scca": (
        {"pattern": "fixed", "chunk_size": 7},
        {"pattern": "flow", "chunk_size": 5},
        {"pattern": "sda", "dilation": 3, "stagger": 1},
        {"pattern": "sda_key", "dilation": 4},
        {"pattern": "longmixed", "chunk_size": 11},
    ),
    "tensorized": (
        {"modes": (5,)},
        {"modes": (3, 2), "local_blocks": 1, "pe": "global", "hop_heads": "kv"},
    ),
    "landmark": ({"block_size": 4}, {"block_size": 3, "top_k": 2, "select_tokens": 1}),
}


@dataclass(frozen=True)
class Variant:
    """A method with some of its options."""

    name: str
    options: Any

    @property
    def method(self) -> AttentionMethod:
        return METHODS[self.name]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the layout kinds that these options accept."""
        return self.method.layouts_for(self.options)

    def __str__(self) -> str:
        given = VARIANTS.get(self.name, ({},))
        words = next(v for v in given if self.method.options(**v) == self.options)
        return "-".join([self.name, *(f"{value}".replace(" ", "") for value in words.values())])


def variants() -> list[Variant]:
    """Return every method with the options of its shared tests; default: the method's defaults."""
    return [
        Variant(name, method.options(**words))
        for name, method in METHODS.items()
        for words in VARIANTS.get(name, ({},))
    ]


@dataclass
class Problem:
    """A whole sequence and the arguments of attention; the same on every rank, pickled by value."""

    name: str
    options: Any
    layout: ContextLayout
    qkv: list[Tensor]
    dout: Tensor
    cu_seqlens: Tensor | None = None
    inv_freq: Tensor | None = None
    softmax_scale: float | None = None
    params: dict[str, Tensor] | None = None
    heads: HeadSlice | None = None

    @property
    def method(self) -> AttentionMethod:
        return METHODS[self.name]

    def keywords(self) -> dict[str, Any]:
        """Return the keywords that `attention` and `reference` share, without params."""
        rotary = None if self.inv_freq is None else Rotary(self.inv_freq, 1.1)
        return {
            "options": self.options,
            "rotary": rotary,
            "cu_seqlens": self.cu_seqlens,
            "softmax_scale": self.softmax_scale,
            "heads": self.heads,
        }


def tiered(cases: Sequence[Any], default: Set[Any]) -> list[Any]:
    """Return all cases as parameters; those outside `default` are marked `exhaustive`."""
    assert default <= set(cases)
    return [
        case if case in default else pytest.param(*case, marks=pytest.mark.exhaustive)
        for case in cases
    ]


def borders(layout: ContextLayout, step: int = 1) -> Tensor:
    """Return borders of documents that start at multiples of `step`.

    Some documents cross shard borders, one has `step` tokens, one is empty, and there is padding at
    the end.
    """
    filled = layout.seqlen - (layout.local_seqlen if layout.cp_size > 1 else 3)
    inner = {1, filled // 3, filled // 2 + 1}
    found = sorted([0, filled // 3, *inner, filled // step * step])
    return torch.tensor([-(-border // step) * step for border in found], dtype=torch.int32)


def make(
    variant: Variant | str,
    kind: str,
    cp_size: int,
    *,
    packed: bool = False,
    at_least: int = 45,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Make random inputs for the shortest legal sequence of at least `at_least` tokens."""
    if isinstance(variant, str):
        variant = Variant(variant, METHODS[variant].options())
    method, options = variant.method, variant.options
    own = method.multiple_of(options, cp_size, kind)
    step = lcm(pieces_needed(kind, cp_size), own)
    layout = ContextLayout(kind, -(-at_least // step) * step, cp_size, own)
    head_dim = 16
    q, k, v, dout = (
        torch.randn(2, layout.seqlen, n, head_dim, dtype=torch.float64).to(dtype)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    inv_freq = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    cu_seqlens = borders(layout, method.multiple_of(options, 1)) if packed else None
    params = {
        key: value.to(q.dtype) + torch.randn(value.shape, dtype=torch.float64).to(q.dtype) / 2
        for key, value in method.initial(options, heads[0]).items()
    }
    problem = Problem(variant.name, options, layout, [q, k, v], dout, cu_seqlens, inv_freq, 0.3)
    problem.params = params or None
    return problem


def learned(problem: Problem) -> dict[str, Tensor] | None:
    """Return copies of the params that require gradients."""
    if problem.params is None:
        return None
    return {name: x.detach().clone().requires_grad_() for name, x in problem.params.items()}


def whole(problem: Problem) -> list[Tensor]:
    """Return [out, dq, dk, dv, gradients of params] of the reference."""
    qkv, params = [x.detach().requires_grad_() for x in problem.qkv], learned(problem)
    out = problem.method.reference(*qkv, params=params, **problem.keywords())
    leaves = [*qkv, *(params or {}).values()]
    return [out.detach(), *torch.autograd.grad(out, leaves, problem.dout.to(out.dtype))]


def on_a_rank(problem: Problem, group: Group, impl: str) -> tuple[list[Tensor], Traffic]:
    """Return this rank's [out, dq, dk, dv, gradients of params], and the bytes it sent."""
    layout, rank, params = problem.layout, group_rank(group), learned(problem)
    qkv = [layout.shard(x, rank, 1).requires_grad_() for x in problem.qkv]
    with traffic() as forward:
        out = problem.method.attention(
            *qkv, layout=layout, group=group, impl=impl, params=params, **problem.keywords()
        )
    with traffic() as backward:
        leaves = [*qkv, *(params or {}).values()]
        grads = torch.autograd.grad(out, leaves, layout.shard(problem.dout, rank, 1))
    return [out.detach(), *grads], Traffic((forward.total,), (backward.total,))


def joined(problem: Problem, shards: Sequence[list[Tensor]]) -> list[Tensor]:
    """Join every rank's [out, dq, dk, dv, gradients of params] to the whole sequence's."""
    parts = list(zip(*shards, strict=True))
    cut, summed = parts[:4], parts[4:]
    whole = [problem.layout.unshard(part, 1) for part in cut]
    return [*whole, *(torch.stack(part).sum(0) for part in summed)]


def on_virtual_ranks(problem: Problem, impl: str) -> tuple[list[Tensor], Traffic]:
    """Return [out, dq, dk, dv, gradients of params] of the whole, and the bytes of every rank."""
    group = VirtualGroup(problem.layout.cp_size)
    ranks = group.run(lambda rank: on_a_rank(problem, rank, impl))
    sent = [counted for _, counted in ranks]
    by_rank = Traffic(tuple(t.forward[0] for t in sent), tuple(t.backward[0] for t in sent))
    return joined(problem, [tensors for tensors, _ in ranks]), by_rank


def output_on_virtual_ranks(problem: Problem, impl: str) -> Tensor:
    """Return out of the whole sequence, without gradients."""
    layout = problem.layout

    @torch.no_grad()
    def forward(group: Group) -> Tensor:
        qkv = [layout.shard(x, group_rank(group), 1) for x in problem.qkv]
        words = problem.keywords() | {"params": problem.params}
        return problem.method.attention(*qkv, layout=layout, group=group, impl=impl, **words)

    return layout.unshard(VirtualGroup(layout.cp_size).run(forward), 1)


def assert_all_match(actual: Sequence[Tensor], reference: Sequence[Tensor]) -> None:
    """Assert that outputs and gradients are the same mathematics in another order."""
    for a, r in zip(actual, reference, strict=True):
        assert_matches(a, r)


def ranks_and_documents(*default: tuple[int, bool]) -> list[Any]:
    """Return (cp_size, packed) as parameters; all pairs but `default` are exhaustive."""
    rest = [
        (cp_size, packed)
        for cp_size in (1, 2, 3, 4, 5, 6, 8)
        for packed in (False, True)
        if (cp_size, packed) not in default
    ]
    return [*default, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in rest)]

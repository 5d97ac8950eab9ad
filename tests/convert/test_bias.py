"""A bias on queries, keys and values: one function on every mesh, counted, never decayed."""

from typing import Any

import pytest

from lcdist.plan import make_plan
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of, optimizer_of
from tests.model.cases import Case, assert_same_gradients, run_cases
from tests.model.small import Meshes, small

SHAPE = ("model.qkv_bias=true", "train.recompute=none")
MESHES = (
    ("parallel.tp_size=2", "parallel.sequence_parallel=true"),
    ("parallel.pp_size=2",),
    ("parallel.cp_size=2",),
)


def test_gradients_are_those_of_one_process() -> None:
    cases = [Case(2, mesh, SHAPE[:1]) for mesh in MESHES]
    reference = cases[0].reference
    [expected] = run_cases(1, [reference]).values()
    assert any(name.endswith("linear_qkv.bias") for name in expected[0][3])
    for ranks in run_cases(2, cases).values():
        assert_same_gradients(ranks, expected)


def start(rank: int, world_size: int) -> Any:
    """(initial biases, parameters of the model, how many tensors decay) of the small model."""
    trainer = Meshes().trainer(small("model.qkv_bias=true"))
    named = dict(chunks_of(trainer)[0].named_parameters())
    biases = {name: p for name, p in named.items() if name.endswith(".bias")}
    optimizer = optimizer_of(trainer)
    decayed = sum(p.numel() for p, d in zip(optimizer.mine, optimizer.decays, strict=True) if d)
    matrices = sum(p.numel() for p in named.values() if p.ndim > 1)
    zero = not any(p.any() for p in biases.values())
    return len(biases), zero, decayed - matrices, sum(p.numel() for p in named.values())


def test_biases_begin_at_0_and_do_not_decay_and_are_counted() -> None:
    count, zero, beside, total = run_ranks(start, 1)[0]
    assert count == 4 and zero and beside == 0
    plan = make_plan(small("model.qkv_bias=true"), 1)
    assert plan.parameters.total == total
    without = make_plan(small(), 1)
    # Four heads, two key heads and two value heads of 16, in each of four layers.
    assert plan.parameters.total - without.parameters.total == 4 * 16 * (4 + 2 * 2)
    assert plan.compute.product_flops_per_token == without.compute.product_flops_per_token


def test_the_default_is_no_bias() -> None:
    with pytest.raises(ValueError, match=r"model.qkv_bias = 'yes': expected bool"):
        small("model.qkv_bias=yes")
    assert not small().model.qkv_bias

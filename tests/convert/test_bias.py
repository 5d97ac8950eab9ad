"""A bias on queries, keys and values: equal gradients on every mesh, no weight decay."""

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


@pytest.mark.parametrize(
    "meshes", [MESHES[:1], pytest.param(MESHES[1:], marks=pytest.mark.exhaustive)], ids=str
)
def test_gradients_match_one_process(meshes: tuple[tuple[str, ...], ...]) -> None:
    cases = [Case(2, mesh, SHAPE[:1]) for mesh in meshes]
    reference = cases[0].reference
    [expected] = run_cases(1, [reference]).values()
    assert any(name.endswith("linear_qkv.bias") for name in expected[0][3])
    for ranks in run_cases(2, cases).values():
        assert_same_gradients(ranks, expected)


def start(rank: int, world_size: int) -> Any:
    """Return (number of biases, all are zero, decayed elements beyond matrices, parameters)."""
    trainer = Meshes().trainer(small("model.qkv_bias=true"))
    named = dict(chunks_of(trainer)[0].named_parameters())
    biases = {name: p for name, p in named.items() if name.endswith(".bias")}
    optimizer = optimizer_of(trainer)
    decayed = sum(p.numel() for p, d in zip(optimizer.mine, optimizer.decays, strict=True) if d)
    matrices = sum(p.numel() for p in named.values() if p.ndim > 1)
    zero = not any(p.any() for p in biases.values())
    return len(biases), zero, decayed - matrices, sum(p.numel() for p in named.values())


def test_biases_start_at_zero_without_decay() -> None:
    count, zero, beside, total = run_ranks(start, 1)[0]
    assert count == 4 and zero and beside == 0
    plan = make_plan(small("model.qkv_bias=true"), 1)
    assert plan.parameters.total == total
    without = make_plan(small(), 1)
    # Four heads, two key heads and two value heads of 16, in each of four layers.
    assert plan.parameters.total - without.parameters.total == 4 * 16 * (4 + 2 * 2)
    assert plan.compute.product_flops_per_token == without.compute.product_flops_per_token


def test_default_has_no_bias() -> None:
    with pytest.raises(ValueError, match=r"model.qkv_bias = 'yes': expected true or false"):
        small("model.qkv_bias=yes")
    assert not small().model.qkv_bias

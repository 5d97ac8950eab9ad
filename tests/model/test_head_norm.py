"""Norms of queries and keys, as in Qwen3: equal gradients on every mesh; counted by the plan."""

from typing import Any

import pytest

from lcdist.config import ConfigError
from lcdist.plan import make_plan
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of, optimizer_of
from tests.model.cases import Case, assert_same_gradients, run_cases
from tests.model.small import DEEPSPEED, FULL, KEEP, SELECTIVE, Meshes, small

NORMS = "model.qk_norm=true"
TP = ("parallel.tp_size=2",)
# Sequence parallelism sums gradients by itself; with one key head both ranks have it.
SEQUENCES = (*TP, "parallel.sequence_parallel=true")
SHARED = ("model.nheads_kv=1",)
CASES = (
    Case(2, TP, (NORMS,)),
    Case(2, SEQUENCES, (NORMS,)),
    Case(2, ("parallel.cp_size=2",), (NORMS,)),
    Case(2, (*SEQUENCES, KEEP), (NORMS,)),
)
MORE = (
    Case(2, ("parallel.pp_size=2",), (NORMS,)),
    Case(2, (*TP, FULL), (NORMS,)),
    Case(2, ("parallel.cp_size=2", SELECTIVE), (NORMS,)),
    Case(2, (*SEQUENCES, DEEPSPEED), (NORMS,)),
)


@pytest.mark.parametrize("cases", [CASES, pytest.param(MORE, marks=pytest.mark.exhaustive)])
def test_gradients_match_one_process(cases: tuple[Case, ...]) -> None:
    check(cases)


def test_gradients_match_where_ranks_share_a_key_head() -> None:
    check((Case(2, TP, (NORMS, *SHARED)), Case(2, SEQUENCES, (NORMS, *SHARED))))


# With LSSAR's usual power of 15, gradients of two meshes differ by 1e-4 with and without norms.
METHODS = {
    "coca": (),
    "scca": ("attention.chunk_size=16",),
    "landmark": ("attention.block_size=4",),
    "lssar": ("attention.power=3",),
    "tensorized": ("attention.modes=[4]",),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_normalized_heads(method: str) -> None:
    shape = (NORMS, f"attention.method={method}", *METHODS[method])
    check((Case(2, TP, shape), Case(2, ("parallel.cp_size=2",), shape)))


def check(cases: tuple[Case, ...]) -> None:
    """Compare gradients with those of one process."""
    reference = cases[0].reference
    [expected] = run_cases(1, [reference]).values()
    norms = [name for name in expected[0][3] if name.endswith("q_layernorm.weight")]
    assert len(norms) == 4
    for ranks in run_cases(2, cases).values():
        assert_same_gradients(ranks, expected)


def start(rank: int, world_size: int) -> Any:
    """Return (names of the norms, all are one, decayed elements beyond matrices, parameters)."""
    trainer = Meshes().trainer(small(NORMS))
    named = dict(chunks_of(trainer)[0].named_parameters())
    norms = [name for name in named if "q_layernorm" in name or "k_layernorm" in name]
    optimizer = optimizer_of(trainer)
    decayed = sum(p.numel() for p, d in zip(optimizer.mine, optimizer.decays, strict=True) if d)
    matrices = sum(p.numel() for p in named.values() if p.ndim > 1)
    ones = all(bool((named[name] == 1).all()) for name in norms)
    return len(norms), ones, decayed - matrices, sum(p.numel() for p in named.values())


def test_norms_start_at_one_without_decay_and_are_planned() -> None:
    count, ones, beside, total = run_ranks(start, 1)[0]
    assert count == 8 and ones and beside == 0
    plan, without = make_plan(small(NORMS), 1), make_plan(small(), 1)
    assert plan.parameters.total == total
    assert plan.parameters.total - without.parameters.total == 4 * 2 * 16
    halves, halves_without = (
        make_plan(small(*TP, *words), 2).parameters.stages for words in ((NORMS,), ())
    )
    # Every rank has them whole.
    assert halves[0] - halves_without[0] == 4 * 2 * 16
    assert plan.compute.product_flops_per_token == without.compute.product_flops_per_token


def adapted(rank: int, world_size: int) -> list[str]:
    trainer = Meshes().trainer(small(NORMS, "lora.rank=2", "lora.norms=true"))
    named = chunks_of(trainer)[0].named_parameters()
    return [name for name, p in named if p.requires_grad and name.endswith("layernorm.weight")]


def test_adapters_leave_the_norms_of_heads() -> None:
    """PEFT's format, and so what can be merged elsewhere, has the layers' norms."""
    trained = run_ranks(adapted, 1)[0]
    assert len(trained) == 9 and not any("self_attention" in name for name in trained)


def test_no_model_has_biases_too() -> None:
    with pytest.raises(ConfigError, match=r"model.qkv_bias = true and model.qk_norm = true"):
        make_plan(small(NORMS, "model.qkv_bias=true"), 1)

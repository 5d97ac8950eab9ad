"""The plan of a run with LoRA adapters: operations, bytes and conflicts."""

import pytest

from lcdist.config import ConfigError
from lcdist.plan import Plan, make_plan, plan_rows
from tests.model.small import small

SIZES = (
    *("model.vocab_size=100", "model.num_layers=3", "model.hidden_size=8", "model.nheads=2"),
    *("model.nheads_kv=1", "model.head_dim=6", "model.ffn_hidden_size=10", "train.seqlen=4"),
)
SOME = ("lora.rank=2", 'lora.targets=["k","o","up","down"]')
# Of one layer: k is 6 x 8, o 8 x 12, up 10 x 8, down 8 x 10.
ADAPTERS = 2 * ((8 + 6) + (12 + 8) + (8 + 10) + (10 + 8))
PRODUCTS = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 3 * 8 * 10


def plan_of(*words: str, world_size: int = 1) -> Plan:
    return make_plan(small(*SIZES, *words), world_size)


def test_parameters_and_operations_by_hand() -> None:
    plain, plan = plan_of(), plan_of(*SOME)
    assert plan.parameters.layer_adapters(1) == ADAPTERS
    assert plan.parameters.total == plain.parameters.total + 3 * ADAPTERS
    assert plan.parameters.trained == 3 * ADAPTERS
    forward = 2 * (3 * (PRODUCTS + ADAPTERS) + 128 * 8)
    # Forward, the gradient of the inputs, and the gradient of the adapters' weights only.
    products = 2 * forward + 2 * 3 * ADAPTERS
    assert plan.compute.flops_per_token == products + 3 * plan.compute.attention_flops_per_token
    assert plain.compute.flops_per_token == 3 * (2 * (3 * PRODUCTS + 128 * 8)) + (
        3 * plain.compute.attention_flops_per_token
    )
    head = plan_of(*SOME, "lora.head=true", "lora.norms=true")
    assert head.compute.flops_per_token == plan.compute.flops_per_token + 2 * 128 * 8
    assert head.parameters.trained == plan.parameters.trained + 128 * 8 + 7 * 8
    tied = plan_of(*SOME, "lora.embeddings=true", "model.tied_embeddings=true")
    assert tied.compute.flops_per_token == head.compute.flops_per_token
    assert tied.parameters.trained == plan.parameters.trained + 128 * 8


def test_rank_has_its_part_of_the_adapters() -> None:
    # A of k and up, and B of o and down, are whole; so is k's B with fewer heads than ranks.
    two = 2 * ((8 + 6) + (6 + 8) + (8 + 5) + (5 + 8))
    assert plan_of(*SOME, "parallel.tp_size=2", world_size=2).parameters.layer_adapters(2) == two


def test_gradients_and_states_count_trained_parameters_only() -> None:
    plan, bf16 = plan_of(*SOME), plan_of(*SOME, "train.dtype=bf16")
    whole, trained = plan.parameters.total, 3 * ADAPTERS
    assert plan.memory.state_bytes == 4 * whole + (4 + 8) * trained
    assert plan.memory.checkpoint_bytes == 4 * whole + 8 * trained
    assert bf16.memory.state_bytes == 2 * whole + (4 + 12) * trained
    assert bf16.memory.checkpoint_bytes == 2 * whole + 12 * trained
    [row] = [value for name, value in plan_rows(plan) if name == "trained"]
    assert row == f"{trained:,} ({trained / whole:.3%}): LoRA of rank 2 on k, o, up, down"
    assert "trained" not in dict(plan_rows(plan_of()))


TIED = "model.tied_embeddings=true"
REFUSED = {
    ("lora.alpha=8", "lora.norms=true"): (
        "lora.alpha = 8.0 has no meaning with lora.rank = 0",
        "lora.norms = True has no meaning with lora.rank = 0",
    ),
    ("lora.rank=2", "lora.targets=[]"): ("lora.targets is empty: name some of q, k, v, o",),
    ("lora.rank=2", 'lora.targets=["q","q"]'): ("lora.targets = q, q: name every target once",),
    ("lora.rank=2", 'lora.targets=["w"]'): ("lora.targets[0] = 'w': must be one of q, k, v, o",),
    ("lora.rank=2", "lora.head=true", TIED): ("set lora.embeddings = true as well",),
    ("lora.rank=2", "lora.load=there"): ("set checkpoint.load to them",),
    ("lora.rank=-1",): ("lora.rank = -1: must be at least 0",),
}


@pytest.mark.parametrize("words", REFUSED, ids=str)
def test_conflicts_are_reported(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_of(*words)
    for message in REFUSED[words]:
        assert message in str(caught.value)


def test_valid_combinations_are_planned() -> None:
    plan_of("lora.rank=2", "lora.head=true", "lora.embeddings=true", TIED)
    plan_of("lora.rank=2", "lora.load=there", "checkpoint.load=base")

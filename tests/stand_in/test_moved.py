"""Operations and bytes of a training step: limits, and what must not come back, without a GPU."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in.test_stand_in import (
    DEBUG,
    METHODS,
    WAITS,
    library,
    needs_the_device,
    run,
)

__all__ = ["library"]
pytestmark = needs_the_device

# Llama-3.2-1B's shape, 16,384 tokens on one GPU, nothing recomputed.
LAYERS = 16
REFERENCE = " ".join(
    [
        f"configs/debug/full.toml model.vocab_size=128256 model.num_layers={LAYERS}",
        "model.hidden_size=2048 model.nheads=32 model.nheads_kv=8 model.ffn_hidden_size=8192",
        "model.tied_embeddings=true train.seqlen=16384 train.global_batch_size=1 train.steps=2",
        "train.recompute=none optim.warmup_steps=0",
    ]
)
# Llama-3-8B's shape cut to eight layers.
SLICE = " ".join(
    [
        "configs/debug/full.toml model.vocab_size=128256 model.num_layers=8 model.nheads=32",
        "model.hidden_size=4096 model.nheads_kv=8 model.ffn_hidden_size=14336",
        "attention.method=scca attention.pattern=fixed attention.chunk_size=8192",
        "lora.rank=8 lora.alpha=16 lora.targets=['q','k','v','o'] lora.norms=true",
        "train.seqlen=32768 train.global_batch_size=1 train.steps=2 optim.warmup_steps=0",
    ]
)
GB = 10**9
# Operations that kernels and products of ours have replaced: logits and their gradient, SwiGLU,
# norms, gradients of the embedding, norms and updates of the optimizer.
REPLACED = {
    *("amax", "logsumexp", "_log_softmax", "gather", "scatter_add_", "nll_loss"),
    *("silu", "silu_backward", "pow", "rsqrt", "mean", "rms_norm", "_fused_rms_norm"),
    *("embedding_dense_backward", "_fused_adamw_", "_foreach_mul_", "square"),
}
# Two layers and two micro-batches have all that more of them have; stages need their own layers.
SHORT = "model.num_layers=2"
TWO = "train.global_batch_size=2"
MESHES = (
    f"{SHORT} {TWO} parallel.tp_size=2 parallel.cp_size=2 parallel.sequence_parallel=true",
    SHORT,
)
STAGES = (
    "parallel.pp_size=2 parallel.tp_size=2 model.vocab_size=250 train.loss=whole",
    "parallel.pp_size=2 parallel.vp_size=2 model.tied_embeddings=true",
)
TILED = "train.recompute=full train.offload=host train.mlp=tiled train.mlp_chunk=64"
KEEP = "train.recompute=keep_attention train.offload=host"
MORE = tuple(
    f"{SHORT} {words}"
    for words in (
        "parallel.tp_size=2 lora.rank=4",
        "parallel.tp_size=2 model.qk_norm=true",
        TILED,
        f"{TILED} lora.rank=4",
        f"{TWO} {KEEP} parallel.cp_size=2 parallel.tp_size=2",
        f"{TWO} parallel.cp_size=4 train.recompute=selective train.loss=chunked "
        "model.tied_embeddings=true",
        "data.documents=pack attention.impl=torch",
    )
)


def counted(library: Path, world_size: int, *cases: str) -> list[dict[str, Any]]:
    """Return what `moved` counts of each configuration, on rank 0."""
    return [json.loads(line) for line in run(library, "moved", "0", str(world_size), *cases)]


def total(rows: list[list[Any]]) -> tuple[int, float]:
    """Return launches and gigabytes of some rows."""
    return sum(row[2] for row in rows), sum(row[3] for row in rows) / GB


def of_kernels(rows: list[list[Any]], word: str) -> tuple[int, float]:
    """Return launches and gigabytes of the kernels with a word in their name."""
    return total([row for row in rows if word in row[1] and "kernel" in row[1]])


def assert_nothing_old(found: dict[str, Any], norms: int) -> None:
    """Assert that no replaced operation ran.

    norms: most gradients that data parallelism may add: those that no product has added.
    """
    names: Counter[str] = Counter()
    for place, name, launches, _ in found["other"]:
        names[name] += launches
        if "distributed_data_parallel" in place:
            assert name == "add_" and launches <= norms, (place, launches)
    assert not REPLACED & set(names), (found["of"], REPLACED & set(names))


def test_a_step_of_the_reference_shape(library: Path) -> None:
    [found] = counted(library, 1, REFERENCE)
    other = found["other"]
    # Every product and attention once, forward and backward, and little else.
    products = 3 * (4 * LAYERS + 1)
    assert total(found["product"])[0] == products
    launches, moved = total(other)
    assert launches + products + total(found["attention"])[0] <= 520
    assert moved <= 119, other[:12]
    assert_nothing_old(found, 2 * LAYERS + 1)
    # (Launches, gigabytes) that each part may take.
    limits = {
        "swiglu": (2 * LAYERS, 34.4),
        "qkv": (2 * LAYERS, 6.5),
        "adamw": (1, 37.2),
        "_stats": (1, 4.3),
        "_grad": (1, 8.5),
    }
    for word, (most, gigabytes) in limits.items():
        launches, moved = of_kernels(other, word)
        assert 0 < launches <= most and moved <= gigabytes, (word, launches, moved)
    # A layer has 3 launches forward, 2 and 2 small ones backward; the final norm 1, and 1 and 1.
    norms = of_kernels(other, "_norm_")
    adds = total([row for row in other if row[0].startswith("layer.py") and row[1] == "add"])
    assert norms[0] + adds[0] == 7 * LAYERS + 3 and norms[1] + adds[1] <= 19.1, (norms, adds)
    # One read of four numbers.
    assert set(found["waits"]) == {"megatron.py: MegatronEngine.step"} or found["waits"] == {
        "megatron.py: step": 4
    }


def test_z_is_made_again_in_swiglus_own_pass(library: Path) -> None:
    [found] = counted(library, 1, f"{REFERENCE} train.recompute=selective")
    assert total(found["product"])[0] == 3 * (4 * LAYERS + 1)
    # Read gate, up and dz, write three: six times 16,384 x 8,192 in bf16, three in forward.
    launches, moved = of_kernels(found["other"], "swiglu")
    assert launches == 2 * LAYERS and abs(moved - LAYERS * 9 * 0.2684) < 0.1, (launches, moved)


def test_a_step_of_a_slice_of_8b_with_lora(library: Path) -> None:
    """Eight layers over 32,768 tokens: launches, and bytes outside of products and attention."""
    [found] = counted(library, 1, f"{SLICE} train.recompute=selective")
    launches, moved = total(found["other"])
    assert launches + total(found["product"])[0] + total(found["attention"])[0] <= 640
    assert moved <= 163, found["other"][:12]
    assert not [row for row in found["other"] if "CopySlices" in row[0]]


def assert_trains(library: Path, rank: int, cases: list[str]) -> None:
    """Assert that configurations train, evaluate and generate on the device, as they should."""
    lines = [json.loads(line) for line in run(library, "training", str(rank), "4", *cases)]
    assert [line["of"] for line in lines] == cases
    for line in lines:
        assert set(line["waits"]) == WAITS, line
        assert sum(line["launches"].values()), line
        # An evaluation reads its loss.
        assert set(line["waits in use"]) == {"forward.py: _global_mean"}, line
        # All kernels were called before the first step, so it compiles none.
        assert not line["compiled late"], line
        if "full.toml" in line["of"] and "impl=torch" not in line["of"]:
            layers = 2 if SHORT in line["of"] else 4
            # Norms of each layer and the last one; factors of a layer's adapters.
            most = 2 * layers + 1 + (14 * layers if "lora" in line["of"] else 0)
            most += 2 * layers if "qk_norm" in line["of"] else 0
            assert_nothing_old(line, most * 4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", MESHES)
def test_every_method_trains(library: Path, mesh: str) -> None:
    assert_trains(library, 1, [f"{DEBUG}/{name}.toml {mesh}" for name in METHODS])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("rank", "words"), [(0, (*STAGES, *MORE)), (3, STAGES)])
def test_full_attention_trains_with_every_option(
    library: Path, rank: int, words: tuple[str, ...]
) -> None:
    assert_trains(library, rank, [f"{DEBUG}/full.toml {each}" for each in words])


@pytest.mark.exhaustive
def test_messages_of_a_layer(library: Path) -> None:
    """Collectives are those of Megatron's layers; context parallelism sends keys and values."""
    config = "configs/debug/full.toml train.steps=2 train.global_batch_size=1 optim.warmup_steps=0"
    mesh = "parallel.tp_size=2 parallel.cp_size=2 parallel.sequence_parallel=true"
    depths = (f"{config} {mesh} model.num_layers={layers}" for layers in (3, 1))
    more, fewer = (Counter(found["messages"]) for found in counted(library, 4, *depths))
    more.subtract(fewer)
    assert {name: n / 2 for name, n in more.items() if n} == {
        # Forward: tokens before two products and after the other two; backward: the same for the
        # gradients, and the tokens of the first two products again, for their weights.
        "all_gather_into_tensor": 6,
        "reduce_scatter_tensor": 4,
        # Keys and values forward, again backward, and a hop of their gradients for each rank.
        "batch_isend_irecv": 4,
    }

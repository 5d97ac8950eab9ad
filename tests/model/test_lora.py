"""LoRA under every mesh: one process's loss, gradients and steps, and nothing kept for the rest."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.engines.internals import chunks_of, ddp_wrappers_of, optimizer_of
from tests.model.lora_cases import (
    CP,
    INTERLEAVED,
    LORA,
    PP,
    SP,
    TP,
    WHOLE,
    Steps,
    some_b,
    steps,
)
from tests.model.small import Meshes, mesh_name, small, take_steps
from tests.model.whole import gather_weights
from tests.tolerance import assert_matches

TIED, ONE_KV = "model.tied_embeddings=true", "model.nheads_kv=1"
AGAIN, CHUNKED = "train.recompute=full", "train.loss=chunked"
KEEP = "train.recompute=keep_attention"
TILES = ("train.mlp=tiled", "train.mlp_chunk=24")
QV = 'lora.targets=["v","q"]'
ATTENTION = {
    "coca": ("attention.method=coca",),
    "scca": ("attention.method=scca", "attention.chunk_size=16"),
    "tensorized": ("attention.method=tensorized", "attention.modes=[4]"),
    "landmark": ("attention.method=landmark", "attention.block_size=8"),
    "lssar": ("attention.method=lssar", "attention.power=3"),
}
# (world size, mesh and what must not change the function, the function)
CASES = [
    (4, (TP, CP), WHOLE),
    (4, (TP, CP, SP, AGAIN), WHOLE),
    (4, (TP, CP, SP), ()),
    (4, (TP, PP, SP, INTERLEAVED), (*WHOLE, TIED)),
    (4, (PP, CP, AGAIN, CHUNKED), ()),
    (4, (CP,), WHOLE),
    (2, (TP,), ()),
    (2, (TP, SP, AGAIN), (ONE_KV,)),
    (2, (TP,), (*WHOLE, ONE_KV)),
    (2, (TP, SP, CHUNKED), (*WHOLE, TIED)),
    (2, (PP, INTERLEAVED), (QV,)),
    (2, (TP, SP), (QV,)),
    (2, (AGAIN,), ("lora.norms=true",)),
    (2, (TP, SP, *TILES), ()),
    (2, (TP, *TILES, AGAIN), WHOLE),
    (2, (CP, "train.recompute=selective"), WHOLE),
    # Adapters do not touch attention: each method is here on one mesh.
    *((2, (TP, SP), ATTENTION[method]) for method in ("coca", "scca", "tensorized")),
    *((2, (CP, KEEP), ATTENTION[method]) for method in ("landmark", "lssar")),
]


def name(case: Any) -> str:
    world_size, how, shape = case
    words = [word.split(".")[-1].replace("=true", "") for word in shape]
    return "-".join([f"{world_size}ranks", mesh_name(how), *words])


@cache
def results(world_size: int, tier: tuple[Any, ...]) -> dict[tuple[str, ...], list[Steps]]:
    """Return the results of a tier's cases of one world size: overrides to every rank's steps."""
    cases = {(*LORA, *shape, *how) for size, how, shape in tier if size == world_size}
    if world_size == 1:
        cases = {(*LORA, *shape) for _, _, shape in tier}
    found = run_ranks(steps, world_size, list(cases), timeout=240)
    return {case: [rank[i] for rank in found] for i, case in enumerate(sorted(cases))}


DEFAULT = (
    (2, (TP,), ()),
    (2, (TP, SP, AGAIN), (ONE_KV,)),
    (2, (TP, SP, CHUNKED), (*WHOLE, TIED)),
    (2, (PP, INTERLEAVED), (QV,)),
    (2, (CP, "train.recompute=selective"), WHOLE),
    (2, (TP, SP), ATTENTION["scca"]),
    (2, (CP, KEEP), ATTENTION["landmark"]),
)
EXHAUSTIVE = tuple(case for case in CASES if case not in DEFAULT)
TIERS = [
    *(pytest.param(DEFAULT, case, id=name(case)) for case in DEFAULT),
    *(
        pytest.param(EXHAUSTIVE, case, id=name(case), marks=pytest.mark.exhaustive)
        for case in EXHAUSTIVE
    ),
]


@pytest.mark.parametrize(("tier", "case"), TIERS)
def test_steps_are_those_of_one_process(tier: tuple[Any, ...], case: Any) -> None:
    world_size, how, shape = case
    [expected] = results(1, tier)[*LORA, *shape]
    ranks = results(world_size, tier)[*LORA, *shape, *how]
    for rank in ranks:
        for found, wanted in zip(rank.numbers, expected.numbers, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)
    found = ranks[0]
    assert found.gradients.keys() == expected.gradients.keys()
    for key, wanted in expected.gradients.items():
        if ".lora." in key:
            assert wanted.count_nonzero(), f"the gradient of {key} proves nothing"
        assert_matches(found.gradients[key], wanted, 1e-5)
    for key, wanted in expected.weights.items():
        assert_matches(found.weights[key], wanted, 1e-5)


# --- what is kept, and how it is stepped ----------------------------------------------------------

HELD = [
    *[(1, (*LORA, *words)) for words in ((), WHOLE, (TIED, *WHOLE), ("train.dtype=bf16",))],
    *[(2, (*LORA, *words)) for words in ((TP, ONE_KV), (PP, TIED, *WHOLE), (PP, INTERLEAVED))],
    (2, (*LORA, CP, QV)),
]


def held(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[tuple[Any, ...]]:
    """By case: what the plan says, what there is, its bytes, and the names with a gradient."""
    meshes, found = Meshes(), []
    for words in cases:
        trainer = meshes.trainer(small(*words))
        take_steps(trainer, 1)
        chunks: Any = chunks_of(trainer)
        named = [pair for chunk in chunks for pair in chunk.named_parameters()]
        assert all(p.grad is None for _, p in named)
        kept = [name for name, p in named if hasattr(p, "main_grad")]
        wrapped: Any = ddp_wrappers_of(trainer)
        buffers = [b for w in wrapped for b in w.buffers]
        sizes = (
            sum(p.numel() for _, p in named),
            sum(sum(p.numel() for p in b.params) for b in buffers),
            sum(master.numel() for master in optimizer_of(trainer).masters),
        )
        plan = trainer.plan
        said = (plan.parameters.stages, plan.parameters.trained_stages, plan.memory.state_bytes)
        whole = (plan.parameters.total, plan.parameters.trained, plan.parameters.trained)
        masters = 12 if plan.dtype == "bf16" else 8
        bytes_held = sizes[0] * plan.shape.itemsize + sizes[1] * 4 + sizes[2] * masters
        found.append((said, whole, sizes, bytes_held, kept))
    return found


@pytest.mark.parametrize("world_size", (1, 2))
def test_only_what_is_trained_has_gradients_and_states(world_size: int) -> None:
    cases = [words for size, words in HELD if size == world_size]
    ranks = run_ranks(held, world_size, cases)
    for words, *found in zip(cases, *ranks, strict=True):
        (parameters, trained, state_bytes), whole, *_ = found[0]
        beside = {name for rank in found for name in rank[4] if ".lora." not in name}
        if set(WHOLE) <= set(words):
            assert {name.split(".")[-2] for name in beside} <= {
                *("word_embeddings", "input_layernorm", "pre_mlp_layernorm"),
                *("final_layernorm", "output_layer"),
            }
        else:
            assert not beside
        assert (found[0][2][0], found[-1][2][0]) == parameters, words
        assert (found[0][2][1], found[-1][2][1]) == trained, words
        if world_size == 1:
            assert found[0][2] == whole, words
        most = max(rank[3] for rank in found)
        assert most <= state_bytes <= 1.1 * most, words


def moved(rank: int, world_size: int) -> dict[str, tuple[float, float]]:
    """Return how far the first step moves each kind of parameter, and its greatest value."""
    words = (
        "lora.norms=true",
        "lora.embeddings=true",
        "lora.lr_ratio=16",
        "optim.weight_decay=0.5",
    )
    with some_b():
        trainer = Meshes().trainer(small(*LORA, *words, "optim.clip_norm=0"))
    named = dict(chunks_of(trainer)[0].named_parameters())
    before = {name: p.detach().clone() for name, p in named.items()}
    take_steps(trainer, 1, 1e-3)
    # Adam's first step is the learning rate wherever the gradient is no noise.
    decay = 0.5 * 1e-3
    kinds = {"A": (1, 1), "B": (16, 16), "layernorm.weight": (1, 0), "embeddings.weight": (1, 1)}
    found = {}
    for name, p in named.items():
        kind = next((k for k in kinds if name.endswith(k) and (len(k) > 1 or ".lora." in name)), "")
        ratio, decays = kinds.get(kind, (0, 0))
        step = (p.detach() - before[name] * (1 - decay * decays)).abs() / 1e-3
        found[name] = (
            step.median().item() if kind != "embeddings.weight" else step.max().item(),
            ratio,
        )
    return found


def test_b_learns_faster_and_matrices_alone_decay() -> None:
    [found] = run_ranks(moved, 1)
    for key, (step, ratio) in found.items():
        assert step == pytest.approx(ratio, rel=1e-2, abs=1e-9), key


def initial(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[dict[str, Tensor]]:
    meshes = Meshes()
    return [gather_weights(meshes.trainer(small(*w)).engine) for w in cases]


def test_factors_begin_within_bounds_and_the_same_on_every_mesh() -> None:
    [[one]] = run_ranks(initial, 1, [LORA])
    [found, piped], _ = run_ranks(initial, 2, [(*LORA, TP, SP), (*LORA, PP, INTERLEAVED)])
    for key in [key for key in one if ".lora." in key]:
        assert torch.equal(found[key], one[key]) and torch.equal(piped[key], one[key]), key
        if key.endswith(".B"):
            assert not one[key].count_nonzero()
        else:
            # Kaiming's uniform with a = sqrt 5: up to 1 / sqrt(in), on both sides of 0.
            bound = one[key].shape[1] ** -0.5
            assert 0.9 * bound < one[key].max() <= bound and -bound <= one[key].min() < -0.9 * bound


def test_recomputation_gives_the_same_bits() -> None:
    words = (*LORA, *WHOLE)
    ways = [(*words, f"train.recompute={how}") for how in ("none", "full", "keep_attention")]
    [[none, *others]] = run_ranks(steps, 1, ways)
    for found in others:
        assert found.numbers == none.numbers
        of_way = found.gradients
        assert [n for n, value in none.gradients.items() if not torch.equal(of_way[n], value)] == []

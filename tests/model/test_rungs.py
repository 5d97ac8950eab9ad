"""Check what plans compute again so that activations fit, by model, length and GPU."""

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config import parse
from lcdist.distributed.mesh import build_mesh, least_of_ranks
from lcdist.hardware.gpu_specs import GPU_SPECS, Hardware
from lcdist.model.build import build_model
from lcdist.model.sequence import SequenceParams
from lcdist.plan import Plan, make_plan, plan_rows
from lcdist.plan.measured import H100
from lcdist.plan.rungs import RUNGS, Mix, Rung
from lcdist.plan.time import step_seconds
from tests.distributed import run_ranks
from tests.live import LiveTensors
from tests.model.small import small

GIB = 2**30
MODELS: dict[str, dict[str, Any]] = {
    "1B": {
        **{"num_layers": 16, "hidden_size": 2048, "nheads": 32, "ffn_hidden_size": 8192},
        "tied_embeddings": True,
    },
    "8B": {"num_layers": 32, "hidden_size": 4096, "nheads": 32, "ffn_hidden_size": 14336},
    "70B": {"num_layers": 80, "hidden_size": 8192, "nheads": 64, "ffn_hidden_size": 28672},
}
TP = ("parallel.tp_size=8", "parallel.sequence_parallel=true")
PP, CP, LORA = "parallel.pp_size=2", "parallel.cp_size=4", "lora.rank=16"
LENGTHS = (8, 32, 128, 512)  # thousand tokens
# (model, GPUs, overrides): by kind of GPU, the rung and device GiB for each of `LENGTHS`.
# keep: keep_attention; t: tiled MLP; c: chunked loss; o: offload; !: does not fit. In brackets, how
# many of a chunk's layers take a cheaper rung, and which.
TABLE: dict[tuple[str, int, tuple[str, ...]], dict[str, str]] = {
    ("1B", 1, ()): {
        "a100-40gb": "none 32, selective+t+c 34 (3 selective), "
        "full+t+c 34 (1 keep+t), full+t+c+o 38!",
        "h100": "none 32, none+c 59, selective+t+c 63 (1 selective), full+t+c 68",
        "h200": "none 32, none+c 59, selective+c 123, keep+t+c 114 (3 selective+t)",
    },
    ("8B", 8, (*TP,)): {
        "a100-40gb": "none 21, none 35, selective+t+c 36, keep+t+c+o 34 (11 keep+t)",
        "h100": "none 21, none 35, selective 71 (6 none), keep+t+c 71 (14 selective+t)",
        "h200": "none 21, none 35, none 89, selective+t+c 119 (8 selective)",
    },
    ("8B", 4, (CP,)): {
        "a100-40gb": "full+t+c+o 69!, full+t+c+o 69!, full+t+c+o 71!, full+t+c+o 77!",
        "h100": "selective 74, keep+t+c 73 (1 selective+t), "
        "keep+t+c+o 72 (2 keep+t), full+t+c+o 77!",
        "h200": "none 76, none 103, selective+t+c 124 (11 selective), full+t+c 123 (15 keep+t)",
    },
    ("8B", 1, (LORA,)): {
        "a100-40gb": "selective+t+c 35 (23 selective), keep+t+c 35 (3 selective+t), "
        "keep+t+c+o 31 (3 keep+t), full+t+c+o 50!",
        "h100": "none 51, selective+t+c 69 (9 selective), full+t+c 67 (12 keep+t), keep+t+c+o 54",
        "h200": "none 51, selective+c 125 (12 none), "
        "keep+t+c 124 (15 selective+t), keep+t+c+o 102 (6 keep+t)",
    },
    ("70B", 16, (*TP, PP)): {
        "a100-40gb": "full+t+c+o 75!, full+t+c+o 76!, full+t+c+o 77!, full+t+c+o 84!",
        "h100": "full+t+c+o 75!, full+t+c+o 76!, full+t+c+o 77!, full+t+c+o 84!",
        "h200": "none 95, selective+t+c 128 (36 selective), "
        "keep+t+c 128 (10 selective+t), keep+t+c+o 119 (9 keep+t)",
    },
    ("70B", 64, (*TP, PP, CP)): {
        "a100-40gb": "full+t+c+o 38!, full+t+c+o 38!, full+t+c+o 39!, full+t+c+o 40!",
        "h100": "none 42, none 58, selective+t+c 72 (14 selective), full+t+c 72 (24 keep+t)",
        "h200": "none 42, none 58, none 121, selective+t+c 124",
    },
    ("70B", 8, (*TP, LORA)): {
        "a100-40gb": "selective 37 (58 none), keep+t+c 36 (56 selective+t), "
        "keep+t+c+o 35 (30 keep+t), keep+t+c+o 31 (2 keep+t)",
        "h100": "none 38, selective+t+c 72 (75 selective), "
        "keep+t+c 72 (22 selective+t), keep+t+c+o 68 (20 keep+t)",
        "h200": "none 38, none 102, selective+t+c 125 (12 selective), full+t+c 124 (18 keep+t)",
    },
}


def plan_of(model: str, length: int, hardware: Hardware, ranks: int, *overrides: str) -> Plan:
    table = {
        "model": {"vocab_size": 128256, "nheads_kv": 8, **MODELS[model]},
        "data": {"source": "synthetic"},
        "train": {"seqlen": 1024 * length, "steps": 1, "global_batch_size": 64},
        "log": {"folder": "unused"},
    }
    return make_plan(parse(table, overrides), ranks, hardware)


def shown(plan: Plan) -> str:
    memory, tokens = plan.memory, plan.shape.local_tokens
    marks = {"t": memory.mlp_chunk(tokens), "c": memory.loss_chunk(tokens), "o": memory.offloads}
    words = [memory.recompute.removesuffix("_attention"), *(x for x, on in marks.items() if on)]
    over, mix = "!" * (memory.device_bytes > memory.usable_bytes), memory.mix
    text = f"{'+'.join(words)} {memory.device_bytes / GIB:.0f}{over}"
    if mix is None:
        return text
    rung = f"{mix.rung.recompute.removesuffix('_attention')}{'+t' * mix.rung.tiled}"
    return f"{text} ({mix.layers} {rung})"


@pytest.mark.parametrize("case", TABLE, ids=lambda case: "-".join((case[0], *case[2])))
def test_table_of_plans(case: tuple[str, int, tuple[str, ...]]) -> None:
    model, ranks, overrides = case
    found = {
        gpu: ", ".join(
            shown(plan_of(model, length, GPU_SPECS[gpu], ranks, *overrides)) for length in LENGTHS
        )
        for gpu in TABLE[case]
    }
    assert found == TABLE[case]


def test_a_plan_takes_the_first_rung_that_fits() -> None:
    for ranks, length, gpu in product((1, 8), (8, 32, 128), ("a100-40gb", "h100", "h200")):
        memory = plan_of("8B", length, GPU_SPECS[gpu], ranks, LORA).memory
        assert memory.usable_bytes == int(0.92 * GPU_SPECS[gpu].memory_bytes)
        assert list(memory.needed_bytes) == list(RUNGS)
        fits = [count <= memory.usable_bytes for count in memory.needed_bytes.values()]
        assert memory.rung == RUNGS[fits.index(True)]
        assert memory.device_bytes >= memory.needed_bytes[memory.rung]
        assert (memory.device_bytes == memory.needed_bytes[memory.rung]) == (memory.mix is None)


def test_the_deepest_layers_use_the_room_that_is_left() -> None:
    for ranks, length, gpu in product((1, 8), (8, 32, 128), ("a100-40gb", "h100", "h200")):
        plan = plan_of("8B", length, GPU_SPECS[gpu], ranks, LORA)
        memory, layers = plan.memory, plan.shape.chunk_layers
        mix, cheaper = memory.mix, memory.cheaper
        if mix is None:
            continue
        assert cheaper is not None and 0 < mix.layers <= layers
        # Beside them, the gradients of one of these layers' activations fit.
        room = memory.usable_bytes - cheaper.saved_bytes(selective=False)
        assert memory.device_bytes <= room
        more = replace(memory, given=memory.rung, given_mix=Mix(mix.rung, mix.layers + 1))
        assert mix.layers == layers or more.device_bytes > room
        # Time lies between those of one rung for all layers.
        alike = [plan_with(plan, rung) for rung in (mix.rung, memory.rung)]
        found = [step_seconds(each, H100) for each in (plan, *alike)]
        own, *times = [seconds for seconds in found if seconds is not None]
        assert len(times) == 2
        assert min(times) - 1e-9 <= own <= max(times) + 1e-9


def plan_with(plan: Plan, rung: Rung, mix: Mix | None = None) -> Plan:
    """Return the plan with other ways to save memory."""
    other = replace(plan)
    vars(other)["memory"] = replace(plan.memory, given=rung, given_mix=mix)
    return other


MIXES = (
    (Rung("full"), Mix(Rung("none"), 1)),
    (Rung("keep_attention", tiled=True), Mix(Rung("selective", tiled=True), 3)),
    (Rung("selective", tiled=True), Mix(Rung("selective"), 2)),
    (Rung("full", offload=True), Mix(Rung("full"), 2)),
    (Rung("selective"), Mix(Rung("none"), 4)),
)


def trained(plan: Plan) -> tuple[int, list[torch.Tensor], list[tuple[str, bool, bool]]]:
    """Return the bytes held after a forward pass, loss and gradients, and layers' policies."""
    [model] = build_model(plan, build_mesh(plan.config.parallel, 0).device)
    tokens = torch.arange(plan.shape.seqlen)[None] * 7 % 250
    sequence = SequenceParams(layout=plan.layout)
    with LiveTensors() as live:
        losses = model(tokens, None, None, labels=tokens, packed_seq_params=sequence)
        kept = live.now
    (losses * torch.linspace(0.5, 2, losses.numel()).view_as(losses)).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    policies = [layer.policy for layer in model.decoder.layers]
    tokens_a_rank = plan.shape.local_tokens
    ways = [(p.recompute, bool(p.mlp_chunk(tokens_a_rank)), bool(p.store)) for p in policies]
    return kept, [losses.detach(), *grads], ways


def mixed(rank: int, world_size: int) -> list[tuple[int, int, float, list[Any]]]:
    """Return for each mix: bytes held more than without it, as planned, difference, policies."""
    plan, found = make_plan(small("model.num_layers=4", "train.seqlen=512"), 1), []
    _, truth, _ = trained(plan_with(plan, Rung("none")))
    for rung, mix in MIXES:
        alike, other = plan_with(plan, rung), plan_with(plan, rung, mix)
        (fewer, *_), (more, values, ways) = trained(alike), trained(other)
        light, heavy = (plan_with(plan, each).memory for each in (mix.rung, rung))
        planned = mix.layers * (light.layer_bytes - heavy.layer_bytes)
        # What is offloaded lies in the same memory on a CPU.
        planned -= alike.memory.host_bytes - other.memory.host_bytes
        off = max(float((x - y).abs().max()) for x, y in zip(values, truth, strict=True))
        found.append((more - fewer, planned, off, ways))
    return found


def test_layers_of_two_kinds_compute_the_same_and_hold_what_is_planned() -> None:
    [found] = run_ranks(mixed, 1)
    for (rung, mix), (held, planned, off, ways) in zip(MIXES, found, strict=True):
        assert off < 2e-6
        assert held == pytest.approx(planned, rel=0.02, abs=2**15), (rung, mix)
        first = 4 - mix.layers
        for number, way in enumerate(ways):
            own = rung if number < first else mix.rung
            assert way == (own.recompute, own.tiled, own.offload)


def test_each_rung_needs_less_than_the_one_before() -> None:
    for model, length in (("1B", 32), ("8B", 128)):
        needed = plan_of(model, length, GPU_SPECS["h200"], 1, LORA).memory.needed_bytes
        on_device = [needed[rung] for rung in RUNGS if not rung.offload]
        assert all(more >= less for more, less in pairwise(on_device))
        offloaded = [needed[rung] for rung in RUNGS if rung.offload]
        assert max(offloaded) < min(on_device)


def test_what_is_set_is_kept_and_restricts_the_choice() -> None:
    def chosen(length: int, *words: str) -> Rung:
        return plan_of("8B", length, GPU_SPECS["h100"], 1, LORA, *words).memory.rung

    assert chosen(8) == Rung("none")
    for way in ("none", "selective", "keep_attention", "full"):
        for length in (8, 128):
            assert chosen(length, f"train.recompute={way}").recompute == way
    assert chosen(8, "train.mlp=tiled") == Rung("none", tiled=True)
    assert chosen(8, "train.loss=chunked") == Rung("none", chunked=True)
    assert not chosen(128, "train.mlp=whole").tiled
    assert chosen(8, "train.offload=host") == Rung("keep_attention", True, True, True)
    assert chosen(128, "train.offload=none") == Rung("full", True, True)
    assert chosen(128, "train.offload=none", "train.recompute=none") == Rung("none", True, True)
    # Nothing fits: the least that is allowed.
    tight = plan_of("8B", 512, GPU_SPECS["a100-40gb"], 1, LORA, "train.offload=none").memory
    assert tight.rung == Rung("full", True, True) and tight.device_bytes > tight.usable_bytes


def test_the_plan_says_why() -> None:
    def said(length: int, *words: str) -> str:
        return dict(plan_rows(plan_of("8B", length, GPU_SPECS["h100"], 1, LORA, *words)))["savings"]

    assert said(8) == "no more than the settings say, as all fits, 73.6 GiB may be filled"
    why, needed = said(32).split("; ")
    assert why == "the cheapest that fits, 73.6 GiB may be filled"
    assert needed == "what is cheaper needs at least 108.8 GiB"
    none = said(512, "train.recompute=none")
    assert none.startswith("nothing that the settings allow fits, 73.6 GiB may be filled: use more")


def test_ranks_plan_for_the_smallest_device_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(numbers: list[int], own: int) -> None:
        numbers[:] = [own, own // 2]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    plan = plan_of("8B", 8, GPU_SPECS["h100"], 2, LORA)
    assert plan.memory.recompute == "none"
    memory = plan.with_device_memory(least_of_ranks(plan.hardware.memory_bytes)).memory
    assert memory.recompute == "selective" and memory.usable_bytes == int(0.92 * 40 * GIB)


def test_batches_longer_than_the_trainings_are_cut() -> None:
    memory = plan_of("8B", 8, GPU_SPECS["h100"], 1, LORA).memory
    assert memory.mlp_chunk(8192) is memory.mlp_chunk(16384) is memory.loss_chunk(8192) is None
    assert memory.mlp_chunk(16385) == 2340 and memory.loss_chunk(32768) == 4096

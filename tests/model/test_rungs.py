"""Check what plans compute again so that activations fit, by model, length and GPU."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch.distributed as dist

from lcdist.config import parse
from lcdist.distributed.mesh import least_of_ranks
from lcdist.hardware.gpu_specs import GPU_SPECS, Hardware
from lcdist.plan import Plan, make_plan, plan_rows
from lcdist.plan.rungs import RUNGS, Rung

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
# keep: keep_attention; t: tiled MLP; c: chunked loss; o: offload; !: does not fit.
TABLE: dict[tuple[str, int, tuple[str, ...]], dict[str, str]] = {
    ("1B", 1, ()): {
        "a100-40gb": "none 32, selective+t+c 31, full+t+c 33, full+t+c+o 38!",
        "h100": "none 32, none+c 59, selective+t+c 59, full+t+c 68",
        "h200": "none 32, none+c 59, selective+c 123, keep+t+c 99",
    },
    ("8B", 8, (*TP,)): {
        "a100-40gb": "none 21, none 35, selective+t+c 36, keep+t+c+o 23",
        "h100": "none 21, none 35, selective 67, keep+t+c 53",
        "h200": "none 21, none 35, none 89, selective+t+c 91",
    },
    ("8B", 4, (CP,)): {
        "a100-40gb": "full+t+c+o 69!, full+t+c+o 69!, full+t+c+o 71!, full+t+c+o 77!",
        "h100": "selective 74, keep+t+c 73, keep+t+c+o 71, full+t+c+o 77!",
        "h200": "none 76, none 103, selective+t+c 105, full+t+c 108",
    },
    ("8B", 1, (LORA,)): {
        "a100-40gb": "selective+t+c 25, keep+t+c 33, keep+t+c+o 25, full+t+c+o 50!",
        "h100": "none 51, selective+t+c 53, full+t+c 55, keep+t+c+o 54",
        "h200": "none 51, selective+c 109, keep+t+c 87, keep+t+c+o 54",
    },
    ("70B", 16, (*TP, PP)): {
        "a100-40gb": "full+t+c+o 75!, full+t+c+o 76!, full+t+c+o 77!, full+t+c+o 84!",
        "h100": "full+t+c+o 75!, full+t+c+o 76!, full+t+c+o 77!, full+t+c+o 84!",
        "h200": "none 95, selective+t+c 97, keep+t+c 117, keep+t+c+o 85",
    },
    ("70B", 64, (*TP, PP, CP)): {
        "a100-40gb": "full+t+c+o 38!, full+t+c+o 38!, full+t+c+o 39!, full+t+c+o 40!",
        "h100": "none 42, none 58, selective+t+c 60, full+t+c 60",
        "h200": "none 42, none 58, none 121, selective+t+c 124",
    },
    ("70B", 8, (*TP, LORA)): {
        "a100-40gb": "selective 32, keep+t+c 28, keep+t+c+o 20, keep+t+c+o 27",
        "h100": "none 38, selective+t+c 39, keep+t+c 60, keep+t+c+o 27",
        "h200": "none 38, none 102, selective+t+c 104, full+t+c 105",
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
    over = "!" * (memory.device_bytes > memory.usable_bytes)
    return f"{'+'.join(words)} {memory.device_bytes / GIB:.0f}{over}"


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
        assert memory.device_bytes == memory.needed_bytes[memory.rung]


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

"""Estimates of saved, tiled and offloaded activations equal those of real layers; conflicts."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config import ConfigError
from lcdist.distributed.mesh import build_mesh
from lcdist.model.build import build_model
from lcdist.model.memory.layer import Layer
from lcdist.model.sequence import SequenceParams
from lcdist.plan import Plan, make_plan, plan_rows
from lcdist.verify import preflight as checks
from lcdist.verify.preflight import check_host_memory, host_memory
from tests.distributed import run_ranks
from tests.live import LiveTensors
from tests.model.small import FULL, HOST, KEEP, SELECTIVE, memory_options, small

TP, CP, PP = (f"parallel.{axis}_size=2" for axis in ("tp", "cp", "pp"))
SP = "parallel.sequence_parallel=true"
TILED = ("train.mlp=tiled", "train.mlp_chunk=256")
WAYS = [(), *memory_options(TILED)]


def plan_of(*words: str, world_size: int = 1) -> Plan:
    return make_plan(small(*words), world_size)


# --- bytes ----------------------------------------------------------------------------------------

TOKENS = 2048
LONG = (f"train.seqlen={TOKENS}", "train.loss=chunked", "train.loss_chunk=64")


def held(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[tuple[int, int, int]]:
    """Return live bytes after forward, their peak, and bytes of the host's store, for each case."""
    found = []
    # The attention's tables of token numbers stay cached: a first run builds them.
    for words in (cases[0], *cases):
        plan = make_plan(small(*words), world_size)
        [model] = build_model(plan, build_mesh(plan.config.parallel, 0).device)
        tokens = torch.zeros(1, plan.layout.local_seqlen, dtype=torch.int64)
        sequence = SequenceParams(layout=plan.layout)
        with LiveTensors() as live:
            losses = model(tokens, None, None, labels=tokens, packed_seq_params=sequence)
            kept = live.now
            losses.sum().backward()
        found.append((kept, live.peak, plan.memory.host_bytes))
    return found[1:]


def two_and_one_layers(mesh: tuple[str, ...], way: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return cases with two layers and one: their difference is one layer's share."""
    return [(*LONG, *mesh, *way, f"model.num_layers={n}") for n in (2, 1)]


@pytest.mark.parametrize(
    ("mesh", "ways"),
    [
        pytest.param((), WAYS, id="one"),
        pytest.param((TP,), WAYS[:4:3], id="tp2", marks=pytest.mark.exhaustive),
        pytest.param((TP, SP), [*WAYS[1:6], (KEEP,)], id="tp2-sp", marks=pytest.mark.exhaustive),
        pytest.param((CP,), [*WAYS[1:6:2], (KEEP,)], id="cp2", marks=pytest.mark.exhaustive),
    ],
)
def test_layer_saves_what_the_plan_estimates(
    mesh: tuple[str, ...], ways: list[tuple[str, ...]]
) -> None:
    world_size = 2 if mesh else 1
    cases = [words for way in ways for words in two_and_one_layers(mesh, way)]
    for found in run_ranks(held, world_size, cases, timeout=120):
        for number, way in enumerate(ways):
            (two, _, host), (one, _, _) = found[2 * number : 2 * number + 2]
            plan = plan_of(*cases[2 * number], world_size=world_size)
            # On a CPU the host's copies are in the same memory; sizes are rounded up on a GPU only.
            inputs = host // 2
            assert bool(inputs) == (HOST in way)
            expected = plan.memory.layer_bytes + inputs
            # The tolerance covers random generators' states and small tables of the attention.
            assert two - one == pytest.approx(expected, rel=0.01, abs=2**14), way


@pytest.mark.exhaustive
def test_recomputation_and_tiling_lower_the_peak_as_estimated() -> None:
    layers = "model.num_layers=6"
    cases = [(*LONG, layers, *way) for way in WAYS]
    [found] = run_ranks(held, 1, cases, timeout=120)
    peaks = {way: peak - host for way, (_, peak, host) in zip(WAYS, found, strict=True)}
    plans = {way: plan_of(*words) for way, words in zip(WAYS, cases, strict=True)}
    for way, peak in peaks.items():
        # Not counted: gradients of one layer's activations in backward.
        layer = plans[()].memory.layer_bytes
        counted = plans[way].memory.activation_bytes
        assert 0.9 * counted < peak < counted + layer, way
    order = [(), (SELECTIVE,), (SELECTIVE, *TILED), (FULL, *TILED), (HOST, *TILED)]
    values = [peaks[way] for way in order]
    assert values == sorted(values, reverse=True)
    assert peaks[(HOST, *TILED)] * 3 < peaks[()]


# --- choices --------------------------------------------------------------------------------------


def test_auto_saves_memory_above_16k_tokens_a_rank() -> None:
    below, above = plan_of("train.seqlen=16384"), plan_of("train.seqlen=16385")
    assert (below.memory.recompute, below.memory.mlp_chunk(16384), below.memory.offloads) == (
        "none",
        None,
        False,
    )
    assert (above.memory.recompute, above.memory.offloads) == ("full", False)
    # 128 MiB would hold gate and up of 174,762 tokens.
    assert above.memory.mlp_chunk(16385) == 16385
    wide = ("train.seqlen=32768", "model.ffn_hidden_size=16384")
    assert plan_of(*wide).memory.mlp_chunk(32768) == 1024
    assert plan_of(*wide, TP, world_size=2).memory.mlp_chunk(32768) == 2048
    assert plan_of(*wide, "train.mlp_chunk=5").memory.mlp_chunk(32768) == 5
    # Halved by context parallelism, doubled by the micro-batch.
    assert plan_of("train.seqlen=32768", CP, world_size=2).memory.recompute == "none"
    assert plan_of("train.seqlen=16384", "train.micro_batch_size=2").memory.recompute == "full"
    for way in ("none", "selective"):
        assert plan_of("train.seqlen=32768", f"train.recompute={way}").memory.recompute == way
    assert plan_of("train.seqlen=32768", "train.mlp=whole").memory.mlp_chunk(32768) is None
    assert plan_of(HOST).memory.recompute == "full"


def test_auto_offloads_on_a_gpu_only() -> None:
    long = plan_of("train.seqlen=16385")
    assert not long.memory.offloads and long.memory.host_bytes == 0
    gpu = replace(long, may_offload=True)
    # Four inputs of 16,385 x 64 fp32, each rounded up to a power of two.
    assert gpu.memory.offloads and gpu.memory.host_bytes == 4 * 2**23
    assert gpu.memory.layer_bytes == 0 and long.memory.layer_bytes == 16385 * 64 * 4
    assert not replace(plan_of("train.seqlen=16384"), may_offload=True).memory.offloads
    for word in ("train.offload=none", "train.recompute=none", SELECTIVE):
        assert not replace(plan_of("train.seqlen=16385", word), may_offload=True).memory.offloads
    # On the first stage two micro-batches of two layers are in flight.
    stages = plan_of("train.seqlen=16384", HOST, PP, world_size=2)
    assert stages.memory.host_bytes == 2 * 2 * 2**22


def test_rows_show_how_memory_is_saved() -> None:
    rows = dict(plan_rows(plan_of("train.seqlen=16384")))
    assert rows["MLP"] == "whole" and rows["offload"] == "none"
    assert rows["recompute"] == "none; kept for backward: 0.045 GiB a layer"
    rows = dict(plan_rows(plan_of("train.seqlen=16384", HOST, *TILED)))
    assert rows["MLP"] == "256 tokens at a time"
    assert rows["recompute"] == "full; kept for backward: 0.000 GiB a layer"
    assert rows["offload"] == "inputs of layers to 0.016 GiB of host memory a rank"
    # A login node may have no GPU: show what the run would do on one.
    rows = dict(plan_rows(plan_of("train.seqlen=16385")))
    there = "none; on a GPU whose host has the room, inputs of layers to 0.031 GiB of host memory a"
    assert rows["offload"].startswith(there) and "activations" in rows["offload"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("train.mlp=whole", "train.mlp_chunk=5"),
            "train.mlp_chunk = 5 has no meaning with train.mlp = 'whole'; set it to 0 or use",
        ),
        ((HOST, SELECTIVE), "train.recompute = 'selective'; use 'keep_attention', 'full' or"),
        ((HOST, "train.recompute=none"), "train.offload = 'host' moves the layer inputs that"),
        (("train.mlp_chunk=-1",), "train.mlp_chunk"),
        (("train.recompute=some",), "train.recompute"),
    ],
)
def test_conflicts_are_rejected(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match="train") as caught:
        plan_of(*words)
    assert message in str(caught.value)


def choices(rank: int, world_size: int, mesh: tuple[str, ...]) -> list[Any]:
    """Return a layer's recompute mode, MLP chunk, offloaded layer and token counts asked for."""
    found = []
    for words in ((), (SELECTIVE,), (HOST, *TILED)):
        plan = make_plan(small(*mesh, *words), world_size)
        [model] = build_model(plan, build_mesh(plan.config.parallel, 0).device)
        layer: Any = model.decoder.layers[1]
        assert isinstance(layer, Layer)
        policy, asked = layer.policy, list[int]()
        layer.policy = replace(policy, mlp_chunk=lambda n, asked=asked: asked.append(n))
        layer(hidden_states=torch.randn(64 // world_size, 1, 64, requires_grad=True))
        away = policy.store._last[0] if policy.store is not None else None
        found.append((policy.recompute, policy.mlp_chunk(999), away, asked))
    return found


@pytest.mark.parametrize("mesh", [(), (TP, SP)], ids=["one", "tp2-sp"])
def test_layers_follow_the_plan(mesh: tuple[str, ...]) -> None:
    for found in run_ranks(choices, 2 if mesh else 1, mesh):
        # A tile's tokens are those of all ranks that share a layer.
        assert found == [
            ("none", None, None, [64]),
            ("selective", None, None, [64]),
            ("full", 256, 2, [64]),
        ]


# --- the host's memory ----------------------------------------------------------------------------


def host_check(rank: int, world_size: int, word: str, free: list[int]) -> tuple[Any, list[str]]:
    """Return whether the plan still offloads, or the error message; and the log."""
    plan = replace(plan_of("train.seqlen=16385", word, world_size=2), may_offload=True)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    checks.log.addHandler(handler)
    try:
        return check_host_memory(plan, free[rank]).memory.offloads, records
    except ValueError as error:
        return str(error), records


# Four inputs of 8 MiB a rank, two ranks on this host.
NEEDED = 2 * 4 * 2**23


def test_offload_starts_if_all_ranks_of_a_host_fit() -> None:
    for word in (HOST, "train.offload=auto"):
        for free in ([NEEDED, NEEDED], [NEEDED, 2 * NEEDED]):
            assert [found for found, _ in run_ranks(host_check, 2, word, free)] == [True, True]


def test_too_little_host_memory_is_rejected_with_numbers() -> None:
    for found, _ in run_ranks(host_check, 2, HOST, [NEEDED, NEEDED - 1]):
        assert "has 0.06 GiB of memory left and its 2 ranks would fill 0.06 GiB" in found
        assert "use train.offload = 'none', fewer ranks on a host, or a greater" in found


def test_auto_without_host_memory_stays_on_the_device_and_logs_it() -> None:
    ranks = run_ranks(host_check, 2, "train.offload=auto", [NEEDED // 2, NEEDED])
    assert [found for found, _ in ranks] == [False, False]
    [line] = [line for _, lines in ranks for line in lines if "keeps activations" in line]
    assert "has 0.03 GiB of memory left" in line


def test_host_memory_respects_a_jobs_limit(tmp_path: Path) -> None:
    free = psutil.virtual_memory().available
    assert 0 < host_memory(tmp_path) <= 2 * free
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n0::/slurm/job_7/step_0\n")
    step = tmp_path / "sys/fs/cgroup/slurm/job_7/step_0"
    step.mkdir(parents=True)
    for group, most, used in ((step, "max", 5), (step.parent, "1000", 300), (tmp_path, "9", 1)):
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text(f"{used}\n")
    assert host_memory(tmp_path) == 700
    (step.parent / "memory.current").write_text("2000\n")
    assert host_memory(tmp_path) == 0

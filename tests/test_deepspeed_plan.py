"""The plan refuses what DeepSpeed cannot do, with value and remedy, and counts its bytes."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lcdist.config import ConfigError
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import Plan, make_plan, plan_rows
from lcdist.plan.deepspeed import deepspeed_config, without_deepspeed
from lcdist.verify.preflight import check_host_memory
from tests.distributed import run_ranks
from tests.model.small import small

H100 = GPU_SPECS["h100"]
ENGINE = "train.engine=deepspeed"
CPU = "deepspeed.offload_optimizer=cpu"
NVME = ("deepspeed.stage=3", "deepspeed.offload_parameters=nvme")


def refusal(*words: str, gpu: bool = False) -> str:
    """Return the one line that refuses a configuration."""
    with pytest.raises(ConfigError) as error:
        make_plan(small(*words), 2, H100 if gpu else None)
    [line] = error.value.errors
    return line


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["deepspeed.stage=4"], ["deepspeed.stage", "4", "0, 1, 2, 3"]),
        (["deepspeed.stag=1"], ["deepspeed.stag", "stage"]),
        (
            ["train.dtype=bf16", "deepspeed.stage=0"],
            ["deepspeed.stage = 0 with train.dtype = 'bf16'", "stage = 1, 2 or 3"],
        ),
        ([CPU, "deepspeed.stage=0"], ["offload_optimizer = 'cpu'", "1, 2 or 3, not 0"]),
        (
            ["deepspeed.offload_parameters=cpu", "deepspeed.stage=2"],
            ["offload_parameters = 'cpu'", "stage = 3, not 2"],
        ),
        (
            [*NVME, "train.dtype=fp32", "deepspeed.nvme_folder=disk"],
            ["offload_parameters = 'nvme' with train.dtype = 'fp32'", "set train.dtype = 'bf16'"],
        ),
        ([*NVME, "train.dtype=bf16"], ["nvme_folder is empty", "offload to 'cpu'"]),
        (
            ["train.engine=megatron", "deepspeed.stage=3"],
            ["deepspeed.stage = 3 has no effect", "set train.engine = 'deepspeed'"],
        ),
    ],
)
def test_a_setting_that_cannot_be_is_refused(words: list[str], parts: list[str]) -> None:
    line = refusal(ENGINE, *words)
    assert all(part in line for part in parts), line


def test_stage_0_is_refused_where_auto_chooses_bf16() -> None:
    line = refusal(ENGINE, "deepspeed.stage=0", gpu=True)
    assert "deepspeed.stage = 0 with train.dtype = 'auto': weights are bf16 here" in line
    assert make_plan(small(ENGINE, "deepspeed.stage=0"), 2).dtype == "fp32"


def test_an_engine_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    line = refusal(ENGINE)
    assert "not installed; pip install 'lcdist[deepspeed]', or set train.engine" in line


@pytest.mark.parametrize(
    ("file", "parts"),
    [
        (
            {"gradient_accumulation_steps": 7},
            ["gradient_accumulation_steps = 7", "the run says 2", "make both equal"],
        ),
        (
            {"zero_optimization": {"stage": 3}},
            ["zero_optimization.stage = 3", "the run says 1"],
        ),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "set [optim]"]),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            ["data_types.grad_accum_dtype = 'bf16'", "the run says 'fp32'"],
        ),
        ({"prescale_gradients": True}, ["prescale_gradients = True", "the run says False"]),
        ({"train_batch_sise": 4}, ["train_batch_sise", "not supported; leave it out"]),
        (
            {"zero_optimization": {"stgae": 3}},
            ["zero_optimization.stgae", "not supported", "sub_group_size"],
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer", "set deepspeed.offload_optimizer = 'cpu'"],
        ),
        (
            {"zero_optimization": {"offload_optimizer": {"pipeline_read": True}}},
            ["offload_optimizer in", "pipeline_read with buffer_count = 4", "buffer_count to 12"],
        ),
        ("{", ["Expecting property name"]),
        ([], ["holds no JSON object"]),
        (None, ["No such file"]),
    ],
)
def test_a_file_that_contradicts_the_run_is_refused(
    tmp_path: Path, file: Any, parts: list[str]
) -> None:
    path = tmp_path / "ds.json"
    if file is not None:
        path.write_text(file if isinstance(file, str) else json.dumps(file))
    line = refusal(ENGINE, f"deepspeed.json_file={path}")
    assert all(part in line for part in ["deepspeed.json_file", *parts]), line


def test_a_file_may_say_the_same_and_more(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    zero = {"stage": 1, "sub_group_size": 1000, "reduce_bucket_size": "auto"}
    path.write_text(json.dumps({"zero_optimization": zero, "steps_per_print": 10}))
    make_plan(small(ENGINE, f"deepspeed.json_file={path}"), 2)


def test_a_trained_model_is_read_without_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(ENGINE, "deepspeed.stage=0", "deepspeed.json_file=gone.json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert make_plan(without_deepspeed(config), 1, H100).dtype == "bf16"


# --- bytes ----------------------------------------------------------------------------------------


def on_gpus(*words: str, world_size: int = 8) -> Plan:
    return make_plan(small(ENGINE, *words), world_size, H100)


LARGE = ("model.hidden_size=1024", "model.ffn_hidden_size=4096", "train.global_batch_size=8")
LARGE += ("deepspeed.reduce_bucket_elements=1000000", "deepspeed.gather_bucket_elements=1000000")


def test_each_stage_divides_more() -> None:
    plans = [on_gpus(*LARGE, f"deepspeed.stage={stage}") for stage in (1, 2, 3)]
    first, second, third = (plan.memory.zero.at_rest for plan in plans if plan.memory.zero)
    count = plans[0].parameters.total
    # bf16 weights, a part of masters and moments; BF16_Optimizer's gradients; ZeRO-3's part.
    assert first == 2 * count + 4 * count + 12 * count // 8
    assert second == 2 * count + 12 * count // 8
    assert third < second


def test_offload_moves_states_to_the_host() -> None:
    here, there = (on_gpus(*LARGE, "deepspeed.stage=2", *more) for more in ((), (CPU,)))
    part = here.parameters.total // 8
    assert here.memory.host_bytes == 0
    assert here.memory.state_bytes - there.memory.state_bytes > 9 * part
    # Masters, moments, gradients and weights, and a checkpoint's copy; pinned ones are rounded.
    assert 30 * part < there.memory.host_bytes < 2 * 30 * part
    rows = dict(plan_rows(there))
    assert "ZeRO stage 2, optimizer on 'cpu', up to" in rows["engine"]


def test_a_buffer_for_weights_on_disk_holds_the_largest() -> None:
    large = ("model.vocab_size=128256", "model.hidden_size=4096", "model.num_layers=1")
    words = (*NVME, "deepspeed.nvme_folder=disk", "train.dtype=bf16")
    plans = [on_gpus(*words, *more, world_size=1) for more in ((), large)]
    sizes = [deepspeed_config(p.shape)["zero_optimization"]["offload_param"] for p in plans]
    assert [size["buffer_size"] for size in sizes] == [10**8, 128256 * 4096]
    assert all(plan.memory.zero is not None for plan in plans)
    # Five of them are in the host's memory.
    grown = [plan.memory.host_bytes for plan in plans]
    assert grown[1] - grown[0] > 5 * 2 * (128256 * 4096 - 10**8)


def host_check(rank: int, world_size: int, free: list[int]) -> list[str]:
    """Return what is said of a host with so many free bytes, for each; "" if it starts."""
    plan = make_plan(small(ENGINE, "deepspeed.stage=2", CPU), world_size)
    said = []
    for available in free:
        try:
            check_host_memory(plan, available)
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def test_offload_without_room_on_the_host_is_refused() -> None:
    plan = make_plan(small(ENGINE, "deepspeed.stage=2", CPU), 2)
    # Both ranks are on this host.
    needed = 2 * plan.memory.host_bytes
    for enough, found in run_ranks(host_check, 2, [needed, needed - 1]):
        assert not enough
        assert "deepspeed.offload_optimizer = 'cpu'" in found and "its 2 ranks would fill" in found
        assert "use 'none' or 'nvme', fewer ranks on a host" in found


def test_offloaded_inputs_and_states_share_the_hosts_memory() -> None:
    words = (ENGINE, "deepspeed.stage=2", CPU, "train.recompute=full", "train.offload=host")
    memory = replace(make_plan(small(*words), 2), may_offload=True).memory
    assert memory.offloaded_bytes and memory.zero is not None
    assert memory.host_bytes == memory.offloaded_bytes + memory.zero.host_bytes

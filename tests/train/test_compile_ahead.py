"""Kernels compiled while the model loads: when that happens, and that it never fails a run.

`tests/stand_in` shows that the kernels of a step are those that were called ahead.
"""

import contextlib
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.model.kernel_calls import call_kernels
from lcdist.plan import Plan, make_plan
from lcdist.train import compile_ahead as module
from lcdist.train.compile_ahead import compile_ahead
from tests.model.small import small


def mesh_on(device: str, cp_rank: int = 0) -> Any:
    where = torch.device(device)
    return SimpleNamespace(device=where, tp_rank=0, cp_rank=cp_rank, is_last_stage=True)


def plan_of(*words: str, memory_bytes: int = 141 << 30) -> Plan:
    config = small(*words)
    hardware = replace(GPU_SPECS["h200"], memory_bytes=memory_bytes)
    return make_plan(config, config.parallel.cp_size, hardware)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the calls of `call_kernels`, on a device that is not there."""
    found: list[Any] = []
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    stream = SimpleNamespace(synchronize=lambda: found.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: stream)
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(module, "call_kernels", lambda *_: found.append("kernels"))
    return found


def test_kernels_are_called_beside_the_block_and_waited_for(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = threading.Event()

    def call(*_: Any) -> None:
        assert loaded.wait(10), "the block does not run beside the calls"
        calls.append("kernels")

    monkeypatch.setattr(module, "call_kernels", call)
    with compile_ahead(plan_of(), mesh_on("cuda")):
        calls.append("loaded")
        loaded.set()
    assert calls == ["loaded", "kernels", "synchronize"]


@pytest.mark.parametrize(
    ("words", "device", "memory_bytes"),
    [((), "cpu", 141 << 30), (("attention.impl=torch",), "cuda", 141 << 30), ((), "cuda", 1 << 20)],
)
def test_nothing_is_called_without_use(
    calls: list[Any], words: tuple[str, ...], device: str, memory_bytes: int
) -> None:
    with compile_ahead(plan_of(*words, memory_bytes=memory_bytes), mesh_on(device)):
        pass
    assert calls == []


def test_an_error_is_logged_and_the_run_goes_on(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(module, "call_kernels", fail)
    with compile_ahead(plan_of(), mesh_on("cuda")):
        pass
    [record] = caplog.records
    assert record.getMessage().endswith("not before: out of shared memory")
    with pytest.raises(KeyError), compile_ahead(plan_of(), mesh_on("cuda")):
        raise KeyError


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.cp_size=4", "attention.layers='coca@0 lssar@1 scca@2'", "train.seqlen=256"),
        ("data.documents=pack",),
    ],
)
def test_a_rank_calls_its_attention_alone(words: tuple[str, ...]) -> None:
    plan = make_plan(small(*words), small(*words).parallel.cp_size)
    call_kernels(plan, mesh_on("cpu", cp_rank=plan.layout.cp_size - 1))


@pytest.mark.gpu
def test_on_a_gpu_nothing_fails(caplog: pytest.LogCaptureFixture) -> None:
    with compile_ahead(make_plan(small("model.head_dim=64"), 1), mesh_on("cuda")):
        pass
    assert caplog.records == []

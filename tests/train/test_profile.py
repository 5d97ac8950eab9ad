"""Profiled steps: the files they leave, the numbers they do not change, the places in the table."""

import contextlib
import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lcdist.commands.train import run
from lcdist.config.schema import Config
from lcdist.report.sections import write_report
from lcdist.rundir.profile import KernelRow, profile_text, read_profiles
from lcdist.rundir.records import StepRecord, read_records, without_profiled
from lcdist.train import profiler
from lcdist.train.profile_tables import NO_KERNEL, profile_of
from lcdist.train.profiler import StepProfiler
from tests.distributed import run_ranks
from tests.model.small import small

LAYERS, MICRO_BATCHES = 2, 2
NAME = "steps_2-3_rank_1"


class Killed(BaseException):
    """The process ends here."""


def config_in(folder: Path, *overrides: str) -> Config:
    words = (f"model.num_layers={LAYERS}", f"train.global_batch_size={MICRO_BATCHES}")
    mesh = ("parallel.cp_size=2", "train.steps=4")
    return small(f"log.folder={folder}", *words, *mesh, *overrides)


def runs(rank: int, world_size: int, folder: Path) -> None:
    """Run without a profile, and with one of two steps on rank 1."""
    os.environ["WORLD_SIZE"] = str(world_size)
    run(config_in(folder / "plain"))
    run(config_in(folder / "profiled", "train.profile=2-3", "train.profile_rank=1"))


def visible(run_folder: Path) -> list[str]:
    return sorted(x.name for x in (run_folder / "profile").glob("*") if not x.name.startswith("."))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(runs, 2, folder)
    return folder


def computed(record: StepRecord) -> tuple[float, ...]:
    return record.step, record.samples, record.tokens, record.loss, record.grad_norm, record.lr


def test_numbers_do_not_change_and_profiled_steps_are_marked(folder: Path) -> None:
    plain, profiled = (read_records(folder / x / "metrics.jsonl") for x in ("plain", "profiled"))
    assert [computed(x) for x in profiled] == [computed(x) for x in plain]
    assert [x.profiled for x in profiled] == [False, True, True, False]
    assert "profiled" not in (folder / "plain" / "metrics.jsonl").read_text()
    assert [x.step for x in without_profiled(profiled)] == [1, 4]
    assert without_profiled(profiled[1:3]) == profiled[1:3]
    assert not (folder / "plain" / "profile").exists()


def test_a_profile_is_a_trace_and_tables(folder: Path) -> None:
    files = folder / "profiled" / "profile" / NAME
    names = sorted(x.name for x in files.iterdir())
    assert names == ["kernels.json", "kernels.txt", "trace.json.gz"]
    with gzip.open(files / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("step 2") == names.count("step 3") == 1
    [profile] = read_profiles(folder / "profiled")
    assert (profile.first, profile.last, profile.rank, profile.device) == (2, 3, 1, "cpu")
    assert (files / "kernels.txt").read_text() == profile_text(profile)
    # Own times of operations leave out of a step what other threads do and count nothing twice.
    assert 0.5 * profile.step_ms < profile.ms < 1.5 * profile.step_ms
    products = [
        (row.phase, row.launches)
        for row in profile.rows
        if row.operation == "aten::matmul" and "layers.*.mlp.linear_fc1 " in row.place
    ]
    layers = 2 * LAYERS * MICRO_BATCHES
    # Backward adds the gradient of a weight by another operation.
    assert sorted(products) == [("backward", layers), ("forward", layers)]
    assert {row.phase for row in profile.rows} == {"forward", "backward", "optimizer", "other"}
    assert profile.peak_bytes >= sum(row.bytes for row in profile.memory) > 0


def test_the_report_shows_the_table_and_leaves_profiled_steps_out(folder: Path) -> None:
    page = write_report(folder / "profiled", folder / "report.html").read_text()
    [profile] = read_profiles(folder / "profiled")
    assert f"profile/{NAME}" in page and f"<td>{profile.rows[0].operation}</td>" in page
    assert page.count("Where a profiled step goes") == 1


class Double(torch.autograd.Function):
    """A Function of our own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] + grads[0]


class Model(nn.Module):
    """Two layers, and a Function after them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return Double.apply(x)  # type: ignore[return-value]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a profile be written without other ranks."""
    monkeypatch.setattr(profiler.dist, "all_reduce", lambda *_: None)


def profile_model(folder: Path, model: Model, device: str = "cpu") -> StepProfiler:
    """Take step 1 of `model` with a profile of it."""
    one = StepProfiler(
        folder,
        range(1, 2),
        is_profiled=True,
        rank=0,
        device=torch.device(device),
        models=[model],
    )
    with one, one.step(1):
        with one.phase("data"):
            x = torch.randn(8, 256)
        model(x).sum().backward()
        with one.phase("optimizer"), torch.no_grad():
            for weight in model.parameters():
                weight -= weight.grad
    assert one.stop_after(1, run_ends=False)
    one.write()
    return one


def test_operations_have_the_places_that_the_model_gives_them(tmp_path: Path, alone: None) -> None:
    model = Model()
    profile_model(tmp_path, model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    [profile] = read_profiles(tmp_path)
    found = {
        (row.phase, row.place, row.operation): (row.launches, row.bytes) for row in profile.rows
    }
    weight, rows = 256 * 256 * 4, 8 * 256 * 4
    expected = {
        ("other", "data", "aten::randn"): (1, rows),
        ("forward", "layers.*", "aten::linear"): (2, 2 * rows),
        ("forward", "model Double", "aten::add"): (1, rows),
        ("backward", "model Double", "aten::add"): (1, rows),
        # The first layer's input needs no gradient.
        ("backward", "layers.*", "aten::mm"): (3, 2 * weight + rows),
        ("optimizer", "optimizer", "aten::sub_"): (2, 0),
    }
    assert {key: found.get(key) for key in expected} == expected
    by_place = {(row.phase, row.place): row.bytes for row in profile.memory}
    assert by_place["backward", "layers.*"] >= 2 * weight


def test_a_killed_profile_leaves_nothing_and_is_written_again(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(profiler, "write_profile", killed)
        profile_model(tmp_path, Model())
    assert visible(tmp_path) == []
    for _ in range(2):
        profile_model(tmp_path, Model())
        assert visible(tmp_path) == ["step_1_rank_0"]
    assert len(read_profiles(tmp_path)) == 1


@pytest.mark.parametrize("fault", ["a file in the way", "a damaged trace"])
def test_a_profile_that_cannot_be_written_is_reported(
    fault: str,
    tmp_path: Path,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if fault == "a file in the way":
        (tmp_path / "profile").write_text(fault)
    else:
        monkeypatch.setattr(profiler, "json", SimpleNamespace(loads=lambda text: json.loads("{")))
    model = Model()
    one = profile_model(tmp_path, model)
    assert "the profile is lost, the run continues" in caplog.text
    assert isinstance(one.phase("optimizer"), contextlib.nullcontext)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_on_cuda_the_allocator_writes_a_snapshot(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **words: calls.append(words))
    monkeypatch.setattr(memory, "_snapshot", lambda: {"segments": []})
    monkeypatch.setattr(profiler, "wait_for_device", lambda device: calls.append(str(device)))
    with pytest.warns(UserWarning, match="CUDA"):
        profile_model(tmp_path, Model(), device="cuda")
    started, stopped = {"max_entries": 200_000, "stacks": "python"}, {"enabled": None}
    assert calls == ["cuda", started, stopped]
    assert (tmp_path / "profile" / "step_1_rank_0" / "memory.pickle").exists()


class Trace:
    """Events in Chrome's format, as torch writes them on a GPU."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def span(
        self, kind: str, name: str, start: float, end: float, tid: int = 1, **args: Any
    ) -> None:
        words = {"ph": "X", "cat": kind, "name": name, "pid": 1, "tid": tid, "ts": start}
        self.events.append(words | {"dur": end - start, "args": args})

    def launch(self, at: float, number: int, kernel: str, us: float, tid: int = 1) -> None:
        """Add a launch and its kernel, which runs later on a stream."""
        self.span("cuda_runtime", "cudaLaunchKernel", at, at + 0.5, tid, correlation=number)
        start = 1000 + 10 * number
        self.span("kernel", kernel, start, start + us, 7, correlation=number)

    def memory(self, at: float, address: int, size: int, tid: int = 1, device: int = 1) -> None:
        args = {"Addr": address, "Bytes": size, "Total Allocated": 5000 + size}
        args["Device Type"] = device
        words = {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": tid}
        self.events.append(words | {"ts": at, "args": args})

    def arrow(self, number: int, forward: tuple[float, int], backward: tuple[float, int]) -> None:
        for ph, (at, tid) in (("s", forward), ("f", backward)):
            words = {"ph": ph, "cat": "fwdbwd", "name": "fwdbwd", "id": number, "pid": 1}
            self.events.append(words | {"tid": tid, "ts": at})


def gpu_trace() -> Trace:
    trace = Trace()
    trace.span("user_annotation", "step 4", 0, 100)
    trace.span("user_annotation", "module decoder.layers.0.mlp", 10, 30)
    trace.span("cpu_op", "aten::linear", 11, 16)
    trace.span("cpu_op", "aten::mm", 12, 15)
    trace.memory(12.5, 0xA, 4096)
    trace.memory(12.6, 0xB, 999, device=0)
    trace.launch(13, 1, "nvjet_sm90", 8)
    trace.span("cpu_op", "SwigluFunction", 18, 25)
    trace.memory(19, 0xC, 512)
    trace.launch(20, 2, "_swiglu_fwd_kernel", 2)
    # Autograd's thread, with a layer that is computed again.
    node = "autograd::engine::evaluate_function: "
    of_mm = {"Sequence number": 7, "Fwd thread id": 1}
    trace.span("cpu_op", node + "MmBackward0", 40, 50, 2, **of_mm)
    trace.span("cpu_op", "MmBackward0", 41, 49, 2, **of_mm)
    trace.span("cpu_op", "aten::mm", 42, 48, 2)
    trace.launch(43, 3, "nvjet_sm90", 9, 2)
    trace.arrow(1, (12, 1), (41, 2))
    trace.span("cpu_op", node + "LayerBackward", 50, 70, 2)
    trace.span("cpu_op", "LayerBackward", 51, 69, 2)
    trace.span("user_annotation", "module decoder.layers.1.mlp", 52, 60, 2)
    trace.launch(53, 4, "_swiglu_fwd_kernel", 2, 2)
    trace.memory(62, 0xD, 256, 2)
    trace.memory(63, 0xA, -4096, 2)
    trace.memory(64, 0xE, -1000, 2)
    trace.span("user_annotation", "phase optimizer", 80, 90)
    trace.launch(81, 5, "_adamw_kernel", 4)
    trace.span("kernel", "of an unknown launch", 2000, 2001, 7, correlation=99)
    return trace


def test_kernels_have_the_place_of_their_launch() -> None:
    profile = profile_of(gpu_trace().events, first=4, last=4, rank=0, device="cuda")
    assert (profile.step_ms, profile.device) == (0.1, "cuda")

    def row(
        place: str, operation: str, kernel: str, us: float, size: int = 0, n: int = 1
    ) -> KernelRow:
        phase, _, place = place.partition(" ")
        words = {"phase": phase, "place": place, "operation": operation, "kernel": kernel}
        return KernelRow(**words, launches=n, ms=us / 1000, bytes=size)

    swiglu = "_swiglu_fwd_kernel"
    expected = [
        row("backward layers.*.mlp", "aten::mm", "nvjet_sm90", 9),
        row("forward layers.*.mlp", "aten::linear", "nvjet_sm90", 8, 4096),
        row("optimizer optimizer", "", "_adamw_kernel", 4),
        row("backward layers.*.mlp", "", swiglu, 2),
        row("forward layers.*.mlp SwigluFunction", "", swiglu, 2, 512),
        row("other step", "", "of an unknown launch", 1),
        row("backward Layer", "", NO_KERNEL, 0, 256, 0),
    ]
    assert list(profile.rows) == expected


def test_memory_at_the_peak_is_by_the_place_that_allocated_it() -> None:
    profile = profile_of(gpu_trace().events, first=4, last=4, rank=0, device="cuda")
    assert (profile.peak_bytes, profile.before_bytes) == (5000 + 4096 + 512 + 256, 5000)
    assert [(x.phase, x.place, x.bytes, x.count) for x in profile.memory] == [
        ("forward", "layers.*.mlp", 4096, 1),
        ("forward", "layers.*.mlp SwigluFunction", 512, 1),
        ("backward", "Layer", 256, 1),
    ]

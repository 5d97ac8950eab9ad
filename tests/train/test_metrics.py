"""A run's numbers: lines survive the trip, a resume forgets the future, other ranks are silent."""

import io
import json
import math
import sys
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lcdist.config.schema import Config, LogConfig, ModelConfig, TrainConfig
from lcdist.hardware.device import device_name
from lcdist.hardware.gpu_specs import find_gpu
from lcdist.hardware.peak import (
    Peak,
    device_peak,
    max_over_ranks,
    mfu,
    peak_memory,
)
from lcdist.rundir.header import RunHeader, read_header, record_start, versions
from lcdist.rundir.records import StepRecord, StepTime, cut_records, read_records
from lcdist.train.metrics import open_metrics, scalars
from tests.distributed import run_ranks


def record(step: int, **changes) -> StepRecord:
    plain = StepRecord(
        step=step,
        samples=4 * step,
        tokens=4 * 512,
        loss=7.25 / step,
        grad_norm=1.5,
        lr=3e-4,
        tokens_per_second=8192.0,
        mfu_full=0.4,
        mfu_causal=None,
        memory_bytes=123_456_789,
        exchange_bytes={"ring": 4096 * step, "gather": 0},
        time=StepTime(step=0.25, data=0.01, forward_backward=0.2, optimizer=0.03),
        wall=1_700_000_000.5 + step,
    )
    return replace(plain, **changes)


def config(folder: Path, **log) -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=256, num_layers=1, hidden_size=32, nheads=2, ffn_hidden_size=64
        ),
        train=TrainConfig(seqlen=512, steps=9),
        log=LogConfig(folder=str(folder), **({"tensorboard": False} | log)),
    )


def write_steps(folder: Path, steps, start: int = 0, **log) -> str:
    """Write `steps` as a run started after `start` does; return the terminal's output."""
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    with open_metrics(
        config(folder, **log), rank=0, step=start, run_id="abc", console=console
    ) as sinks:
        for step in steps:
            sinks.write(record(step))
    return screen.getvalue()


# --- the record ---


def test_a_record_survives_the_trip_through_json():
    there = record(3)
    assert StepRecord.from_json(there.to_json()) == there


def test_the_parts_of_a_steps_time_sum_to_the_step():
    time = json.loads(record(1).to_json())["time"]
    assert set(time) == {"step", "data", "forward_backward", "optimizer", "other"}
    parts = time["data"] + time["forward_backward"] + time["optimizer"] + time["other"]
    assert parts == pytest.approx(time["step"], abs=1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_on_disk_and_nan_again(value):
    line = record(1, loss=value, mfu_full=value).to_json()
    table = json.loads(line, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert table["loss"] is None and table["mfu_full"] is None
    back = StepRecord.from_json(line)
    assert math.isnan(back.loss)
    assert back.mfu_full is None and back.mfu_causal is None


def test_scalars_leave_out_what_is_not_finite_and_name_every_verb():
    table = scalars(record(2, loss=math.nan))
    assert "train/loss" not in table and "speed/mfu_causal" not in table
    assert table["exchange/ring_bytes"] == 8192 and table["train/lr"] == 3e-4


# --- the file ---


def test_steps_are_one_line_each_and_read_back_in_order(tmp_path):
    write_steps(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == 5
    assert read_records(path) == [record(step) for step in range(1, 6)]


def test_a_flipped_bit_is_named_or_changes_no_number(tmp_path):
    write_steps(tmp_path, [1, 2])
    path, refused = tmp_path / "metrics.jsonl", 0
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for place in range(first, len(whole) - 1):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        try:
            assert read_records(path) == [record(1), record(2)], place
        except ValueError as error:
            assert f"{path}:2: not " in str(error) or f"{path}:3: not " in str(error), place
            refused += 1
    # What is not refused is the checksum's own name.
    assert len(whole) - 1 - first - refused < 20


def test_a_line_is_with_the_system_before_the_next_step(tmp_path):
    console = Console(file=io.StringIO())
    with open_metrics(config(tmp_path), rank=0, step=0, run_id="a", console=console) as sinks:
        sinks.write(record(1))
        assert read_records(tmp_path / "metrics.jsonl") == [record(1)]


def test_a_resumed_run_leaves_the_file_of_a_run_that_never_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    write_steps(whole, range(1, 10))
    write_steps(parts, range(1, 8))
    with (parts / "metrics.jsonl").open("a") as file:
        file.write(record(8).to_json()[:40])  # killed in the middle of a line
    write_steps(parts, range(5, 10), start=4)
    assert (parts / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_run_from_the_beginning_forgets_all_steps(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, [1], start=0)
    assert [r.step for r in read_records(tmp_path / "metrics.jsonl")] == [1]


def test_the_cut_is_atomic(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cut_records(path, 1)
    assert path.read_bytes() == before


def test_a_gap_before_the_resume_is_told(tmp_path, caplog):
    write_steps(tmp_path, [1, 2])
    cut_records(tmp_path / "metrics.jsonl", 5)
    assert "2 of the 5 steps" in caplog.text


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{not json", "property name"),
        ("[1, 2]", "expected an object"),
        (record(2).to_json().replace('"lr"', '"lrr"'), "key 'lr' is missing"),
        (
            record(2).to_json().replace('"step": 2', '"step": "2"'),
            'step = "2": expected a whole number',
        ),
        (record(1).to_json(), "step 1 comes after step 1"),
    ],
)
def test_a_broken_line_is_named_with_its_file(tmp_path, line, says):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{record(1).to_json()}\n{line}\n{record(3).to_json()}\n")
    with pytest.raises(ValueError, match=says) as caught:
        read_records(path)
    assert f"{path}:2:" in str(caught.value)


def test_bytes_that_are_not_text_are_named_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f"{record(1).to_json()}\n".encode() + b"\xff\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not UTF-8"):
        read_records(path)


def test_a_last_line_cut_short_is_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{record(1).to_json()}\n{record(2).to_json()[:-9]}")
    assert read_records(path) == [record(1)]
    assert f"{path}:2" in caplog.text


# --- the sinks ---


def test_ranks_other_than_zero_touch_nothing(tmp_path, capfd):
    folder = tmp_path / "not there"
    with open_metrics(config(folder, tensorboard=True), rank=3, step=2, run_id="a") as sinks:
        sinks.write(record(3))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write_steps(tmp_path, range(1, 6), tensorboard=True)
    write_steps(tmp_path, range(4, 8), start=3, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 8))


def test_wandb_asked_for_and_not_installed_is_refused_on_every_rank(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for rank in (0, 1):
        with pytest.raises(ValueError, match=r"log\.wandb = true.*pip install 'lcdist\[wandb\]'"):
            open_metrics(config(tmp_path, wandb=True), rank=rank, step=0, run_id="a")
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_given_the_run_id_and_every_step(tmp_path, monkeypatch):
    calls: list = []

    class Run:
        def log(self, table, step):
            calls.append((step, table["train/lr"]))

        def finish(self):
            calls.append("finish")

    fake = ModuleType("wandb")
    fake.__spec__ = ModuleSpec("wandb", None)
    fake.init = lambda **given: calls.append((given["id"], given["resume"])) or Run()  # type: ignore
    monkeypatch.setitem(sys.modules, "wandb", fake)
    write_steps(tmp_path, [1, 2], wandb=True)
    assert calls == [("abc", "allow"), (1, 3e-4), (2, 3e-4), "finish"]


def test_a_pipe_gets_the_first_and_the_last_step_and_is_not_flooded(tmp_path):
    told = write_steps(tmp_path, range(1, 10)).splitlines()
    assert len(told) < 9
    assert "step 1/9" in told[0] and "loss 7.2500" in told[0] and "8.2k tokens/s" in told[0]
    assert "step 9/9" in told[-1]


def test_a_terminal_gets_a_bar_that_ends_full(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, width=120, force_terminal=True)
    with open_metrics(config(tmp_path), rank=0, step=7, run_id="a", console=console) as sinks:
        sinks.write(record(8))
        sinks.write(record(9))
    assert "9/9" in screen.getvalue() and "loss 0.8056" in screen.getvalue()


# --- the header ---


def test_every_start_is_noted_and_the_id_stays(tmp_path):
    header = RunHeader(
        plan={"layout": "zigzag"},
        device=device_name(torch.device("cpu")),
        peak=asdict(Peak(1e12, "config")),
        world_size=2,
        versions=versions(),
    )
    first = record_start(tmp_path, header, 0, "new run")
    second = record_start(tmp_path, replace(header, world_size=4), 30, "resumed")
    table = read_header(tmp_path / "run.json")
    assert first == second == table["id"]
    starts = [(start["step"], start["reason"], start["world_size"]) for start in table["starts"]]
    assert starts == [(0, "new run", 2), (30, "resumed", 4)]
    assert table["plan"] == {"layout": "zigzag"} and table["peak"]["source"] == "config"
    assert {"python", "torch", "numpy"} <= set(table["versions"])


def test_a_broken_header_is_named_with_its_line(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{\n "id": oops\n}')
    with pytest.raises(ValueError, match=r"run\.json:2: not JSON"):
        read_header(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"run\.json: key 'id' is missing"):
        read_header(path)


# --- peaks ---


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("Some Other Device", None),
    ],
)
def test_a_gpus_name_is_matched_word_by_word(name, tflops):
    gpu = find_gpu(name)
    assert (gpu and gpu.bf16_flops) == (tflops and tflops * 1e12)


def test_the_peak_says_where_it_comes_from():
    cpu = torch.device("cpu")
    assert device_peak(cpu, torch.float32, 2.5) == Peak(2.5e12, "config")
    measured = device_peak(cpu, torch.float32)
    assert measured.source == "measured" and measured.flops > 0


def test_mfu_is_the_fraction_of_all_devices():
    assert mfu(6e6, 1e5, Peak(1e12, "config"), 4) == pytest.approx(0.15)


def test_peak_memory_is_in_bytes_and_at_least_what_is_held_now():
    peak = peak_memory(torch.device("cpu"))
    held = psutil.Process().memory_info().rss
    assert 0.9 * held <= peak < 100 * held


def _maximum(rank: int, world_size: int) -> dict[str, int]:
    values = {"memory": 2**40 + rank, "ring": 100 - rank}
    group = torch.distributed.group.WORLD
    return max_over_ranks(values, group, torch.device("cpu"))


def test_the_maximum_over_ranks_is_taken_value_by_value():
    assert run_ranks(_maximum, 2) == [{"memory": 2**40 + 1, "ring": 100}] * 2
    assert max_over_ranks({"ring": 7}, None, torch.device("cpu")) == {"ring": 7}

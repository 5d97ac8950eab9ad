"""The estimated time of a step: its operations, the measured rates, and the measured steps."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from lcdist.config import load
from lcdist.hardware.gpu_specs import GPU_SPECS
from lcdist.plan import Plan, make_plan
from lcdist.plan.measured import H100, STEPS, MeasuredStep
from lcdist.plan.time import ATTENTION_BACKWARD, AttentionRow, step_seconds, step_work

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "kernels" / "bench" / "results"


def plan_of(*overrides: str, world_size: int = 1) -> Plan:
    config = load(ROOT / "configs" / "debug" / "full.toml", ["parallel.cp_size=1", *overrides])
    return make_plan(config, world_size, GPU_SPECS["h100"])


@pytest.mark.parametrize("step", STEPS, ids=lambda step: f"{step.device} {step.what}")
def test_estimates_beside_the_measured_steps(step: MeasuredStep) -> None:
    """The rates are the H100's; kernels were faster at the commit that the H200 ran."""
    assert abs(step.error) < (0.1 if step.device.startswith("H100") else 0.25)


@pytest.mark.parametrize("row", H100.attention, ids=lambda row: f"{row.method} {row.options}")
def test_a_row_of_attention_is_a_measured_one(row: AttentionRow) -> None:
    """`full` is torch's own, which a step uses."""
    name = "sdpa" if row.method == "full" else row.method
    found = []
    for file in RESULTS.glob("*.csv"):
        with file.open(encoding="utf-8", newline="") as stream:
            for line in csv.DictReader(stream):
                same = name in line.get("contender", "") and line.get("seqlen") == "32768"
                if same and "H100" in line.get("gpu", "") and line["fwd_ms"] and line["bwd_ms"]:
                    found.append((float(line["fwd_ms"]), float(line["bwd_ms"])))
    assert any(
        row.forward == pytest.approx(forward, rel=0.01)
        and row.backward == pytest.approx(backward, rel=0.01)
        for forward, backward in found
    ), found


def test_work_counts_what_is_done_again() -> None:
    plain = plan_of("train.recompute=none", "train.loss=whole", "train.mlp=whole")
    compute, tokens = plain.compute, plain.config.train.global_batch_size * plain.shape.seqlen
    work = step_work(plain)
    assert work.products == 3 * compute.product_flops_per_token * tokens
    [(forward, backward)] = work.attention.values()
    assert forward == pytest.approx(compute.attention_flops_per_token * tokens)
    assert backward == ATTENTION_BACKWARD * forward
    assert work.flops == work.products + forward + backward
    again = step_work(plan_of("train.recompute=full", "train.loss=whole", "train.mlp=whole"))
    output = 2 * plain.shape.padded_vocab_size * plain.config.model.hidden_size * tokens
    whole = compute.product_flops_per_token * tokens
    model = plain.config.model
    fc2 = 2 * model.num_layers * model.hidden_size * model.ffn_hidden_size * tokens
    # The last product of a layer is not made again: nobody reads its result.
    assert again.products == work.products + whole - output - fc2
    [(forward_again, _)] = again.attention.values()
    assert forward_again == 2 * forward
    chunked = step_work(plan_of("train.recompute=none", "train.loss=chunked", "train.mlp=whole"))
    assert chunked.products == work.products + output


def test_frozen_weights_take_no_gradient() -> None:
    assert step_work(plan_of("lora.rank=2")).products < 0.8 * step_work(plan_of()).products


def test_a_row_at_its_own_size_takes_its_own_time() -> None:
    """One layer of 32 heads of 128 over 32,768 tokens, and nothing else but its products."""
    model = ["model.num_layers=1", "model.hidden_size=4096", "model.nheads=32", "model.nheads_kv=8"]
    plan = plan_of(
        *model, "train.seqlen=32768", "train.global_batch_size=1", "train.recompute=none"
    )
    free = replace(H100, products=float("inf"), moved=float("inf"))
    full = next(row for row in H100.attention if row.method == "full")
    assert step_seconds(plan, free) == pytest.approx(1e-3 * (full.forward + full.backward))
    halves = plan_of(
        *model,
        "train.seqlen=32768",
        "train.global_batch_size=1",
        "train.recompute=none",
        "parallel.cp_size=2",
        world_size=2,
    )
    one, two = step_seconds(plan, H100), step_seconds(halves, H100)
    assert one is not None and two == pytest.approx(one / 2, rel=0.01)
    # Heads of 64 reach less of the rate.
    narrow = replace(free, narrow=0.5)
    small = [word.replace("4096", "2048") for word in model]
    slow = plan_of(*small, "train.seqlen=32768", "train.global_batch_size=1")
    assert step_seconds(slow, narrow) == pytest.approx(
        2 * (step_seconds(slow, replace(free, narrow=1.0)) or 0)
    )


def test_what_was_not_measured_has_no_time() -> None:
    selected = plan_of("attention.method=landmark", "attention.top_k=2", "train.seqlen=4096")
    assert step_seconds(selected, H100) is None
    assert step_seconds(plan_of("attention.method=landmark", "train.seqlen=4096"), H100)

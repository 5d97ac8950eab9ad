"""The GPU benchmarks, tried at tiny sizes: rows, gate, order, pictures, and what may go wrong.

Without a GPU kernels run in Triton's interpreter; times mean nothing then, lines are what is tried.
"""

import csv
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from lcdist_kernels.full import AttentionImpl
from lcdist_kernels.full import impl as operator
from lcdist_kernels.scca import Rule
from tests.interpreter import interpret_without_gpu
from tests.kernels.library_stand_ins import libraries

ROOT = Path(__file__).parents[1]
interpret_without_gpu()
sys.path.append(str(ROOT / "kernels" / "bench"))

harness, gpu_harness, place = map(import_module, ("harness", "gpu_harness", "place"))
gpu_check, gpu_ranks, gpu_rivals = map(import_module, ("gpu_check", "gpu_ranks", "gpu_rivals"))
gpu_tests, relay, goals = map(import_module, ("gpu_tests", "relay", "goals"))
plot, bench_all, bench_lssar = map(import_module, ("plot", "bench_all", "bench_lssar"))

HAS_GPU = place.HAS_GPU
TINY = gpu_harness.Size(2048, 8, 4, 64) if HAS_GPU else gpu_harness.sizes()[0]
FULL, RIVAL = gpu_check.BENCHES[0].contenders[:2]


@pytest.fixture(autouse=True)
def unwritten_shows() -> None:
    """Nothing: libraries and benchmarks may leave what they like in memory."""


# --- rows and the gate ----------------------------------------------------------------------------


@pytest.mark.parametrize("bench", gpu_check.BENCHES, ids=lambda bench: bench.name)
def test_every_contender_of_a_script_gives_a_row(bench: Any) -> None:
    rows = list(gpu_harness.rows_of(bench, [TINY]))
    assert [row["contender"] for row in rows] == [each.name for each in bench.contenders]
    assert {"lcdist", "torch", "FlexAttention"} <= {row["contender"].split()[0] for row in rows}
    for row, contender in zip(rows, bench.contenders, strict=True):
        assert list(row) == gpu_harness.COLUMNS and row["note"] == contender.note
        assert 0 < float(row["error"]) <= gpu_harness.ALLOWED[TINY.dtype]
        for name in ("fwd", "bwd") if contender.backward else ("fwd",):
            assert all(row[f"{name}_{what}"] > 0 for what in ("ms", "tflops", "gbps")), row
        assert (row["bwd_ms"] != "") == contender.backward
        assert "TFLOP/s" in gpu_harness.said(row)


def break_kernel(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    def bwd(*args: Any, **words: Any) -> tuple[Tensor, ...]:
        dq, dk, dv = whole.bwd(*args, **words)
        return dq, dk * share, dv

    whole = operator.TRITON_IMPL
    monkeypatch.setattr(operator, "TRITON_IMPL", AttentionImpl(whole.fwd, bwd))


@pytest.mark.parametrize("share", [1.1, float("nan")])
def test_a_wrong_kernel_is_a_row_without_time(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_kernel(monkeypatch, share)
    rows = gpu_harness.Rows()
    row = rows.row(FULL, TINY)
    assert row["note"].startswith("not timed: ArithmeticError: dk is off by"), row["note"]
    assert not any(row[name] for name in gpu_harness.MEASURED)
    # It is not looked at again at another length, and does not keep others from being timed.
    monkeypatch.setattr(gpu_harness, "gate", lambda *args: pytest.fail("a second gate"))
    assert rows.row(FULL, replace(TINY, seqlen=2 * TINY.seqlen))["note"] == row["note"]
    assert "dk is off" in gpu_harness.said(row)


def raising(error: BaseException, calls_before: int) -> Any:
    calls = count()

    def build(options: Any, size: Any) -> Any:
        if next(calls) >= calls_before:
            raise error
        return RIVAL.build(options, size)

    return replace(RIVAL, build=build, note="")


@pytest.mark.parametrize("calls_before", [0, 1])
def test_out_of_memory_is_a_row(calls_before: int) -> None:
    rows = gpu_harness.Rows()
    row = rows.row(raising(torch.OutOfMemoryError("2 GiB\nmore"), calls_before), TINY)
    assert row["note"].endswith("OutOfMemoryError: 2 GiB more") and not row["fwd_ms"]
    assert row["note"].startswith("not timed") == (calls_before == 0)
    assert rows.row(FULL, TINY)["fwd_ms"] > 0


def test_the_gate_looks_at_a_rival_too(monkeypatch: pytest.MonkeyPatch) -> None:
    of_values = replace(
        RIVAL, build=lambda options, size: lambda q, k, v: gpu_rivals.sdpa(q, 2 * k, v)
    )
    assert "out is off" in gpu_harness.Rows().row(of_values, TINY)["note"]


def test_work_is_counted_by_hand() -> None:
    size = gpu_harness.Size(1024, 32, 8, 128)
    pairs = 1024 * 1025 // 2
    assert gpu_harness.Operator().flops(size) == (4 * 32 * 128 * pairs, 10 * 32 * 128 * pairs)
    # Three products forward, five backward.
    [lssar, lssa] = [bench_lssar.KINDS[n].flops(size) for n in (0, 1)]
    assert lssar == (6 * 32 * 128 * pairs, 10 * 32 * 128 * pairs)
    assert lssa == (4 * 32 * 128 * pairs, 10 * 32 * 128 * pairs)
    q, k = 1024 * 128 * 32 * 2, 1024 * 128 * 8 * 2
    forward, backward = size.gigabytes()
    assert round(1e9 * forward) == 2 * q + 2 * k and round(1e9 * backward) == 4 * q + 4 * k


def run_main(bench: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    return gpu_harness.main(bench)


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(*args: Any) -> Iterator[dict[str, Any]]:
        yield rows.row(RIVAL, TINY)
        raise KeyboardInterrupt

    rows = gpu_harness.Rows()
    monkeypatch.setattr(gpu_harness, "rows_of", some)
    for runs in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run_main(gpu_check.BENCHES[0], monkeypatch, "--out", str(tmp_path))
        found = read(tmp_path / "full.csv")
        assert len(found) == runs and float(found[-1]["fwd_ms"]) > 0
        assert found[0]["gpu"] == place.device_name() and found[0]["commit"]


def test_a_script_says_by_its_status_that_results_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_harness, "sizes", lambda: [TINY])
    sizes = ["--seqlen", str(TINY.seqlen), "--head-dim", str(TINY.head_dim), "--only", "lcdist"]
    bench = gpu_check.BENCHES[0]
    assert run_main(bench, monkeypatch, "--out", str(tmp_path), *sizes) == 0
    break_kernel(monkeypatch, 1.1)
    assert run_main(bench, monkeypatch, "--out", str(tmp_path), *sizes) == 1
    assert [bool(row["fwd_ms"]) for row in read(tmp_path / "full.csv")] == [True, False]


def test_rows_of_other_columns_are_not_mixed(tmp_path: Path) -> None:
    harness.write("full", [{"a": 1}], tmp_path)
    with pytest.raises(ValueError, match="has the columns"):
        harness.write("full", [{"b": 1}], tmp_path)
    harness.write("full", [{"a": 2}], tmp_path)
    assert read(tmp_path / "full.csv") == [{"a": "1"}, {"a": "2"}]


def test_libraries_that_are_here_are_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gpu_harness.Operator()
    assert not HAS_GPU and not gpu_harness.by_libraries(plain) or HAS_GPU
    with libraries(monkeypatch, "cudnn", "fa4"):
        for module in (gpu_harness, gpu_rivals):
            monkeypatch.setattr(module, "HAS_GPU", True)
        monkeypatch.setattr("lcdist_kernels.full.library_choice.HALF", (torch.bfloat16,))
        rivals = [each.name for each in gpu_rivals.causal_rivals(plain)]
        assert rivals == ["torch sdpa", "cuDNN", "FlashAttention-4", "FlexAttention"]
        made = gpu_harness.by_libraries(plain)
        assert [each.name for each in made] == ["lcdist full impl=cudnn", "lcdist full impl=fa4"]
        size = replace(TINY, head_dim=24, seqlen=40, dtype="bfloat16")
        # The stand-ins take CPU tensors.
        for each in made * (not HAS_GPU):
            assert gpu_harness.gate(each, size) < gpu_harness.ALLOWED["bfloat16"]


# --- masks for FlexAttention ----------------------------------------------------------------------


RULES = [
    *[Rule("chunk", 200)] * 2,
    *[Rule("chunk", 200, 100), Rule("fold", 100, 200)],
    *[Rule("pair", 4, 1), Rule("pair", 4, 3), Rule("key", 2, 1), Rule("split", 150, 70)],
]


def test_a_block_mask_is_that_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seqlen = 640
    # So small that every stripe is one tile of queries.
    monkeypatch.setattr(gpu_rivals, "AT_ONCE", 1)
    got = gpu_rivals.mask_of_rules(RULES, seqlen)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        masks = torch.stack([rule.mask(at, at.T) for rule in RULES])
        return masks.to(i.device)[h, i, j]

    at = torch.arange(seqlen)[:, None]
    expected = create_block_mask(seen, None, len(RULES), seqlen, seqlen, device=place.DEVICE)
    assert torch.equal(got.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    assert got.full_kv_num_blocks is not None and got.full_kv_num_blocks.sum() > 0
    heads = torch.arange(len(RULES), device=place.DEVICE)[:, None, None]
    i, j = (x.to(place.DEVICE) for x in (at, at.T))
    every = got.mask_mod(torch.tensor(0), heads, i, j)
    assert torch.equal(every, seen(torch.tensor(0), heads, i, j))


# --- gpu_check: order, children, goals ------------------------------------------------------------


def test_the_most_telling_rows_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [
        gpu_harness.Size(n, 32, 8, d) for n in gpu_harness.LENGTHS for d in gpu_harness.HEAD_DIMS
    ]
    monkeypatch.setattr(gpu_check, "sizes", lambda: sizes)
    items = gpu_check.kernel_items()
    places = {shape: number for number, shape in enumerate(gpu_check.ORDER)}
    assert len(places) == len(sizes)
    quick = [(bench, each, size) for bench, each, size in items if each.stage < 2]
    at = [places[size.seqlen, size.head_dim] for _, _, size in quick]
    assert at == sorted(at)
    ours = [each.stage for _, each, size in quick if (size.seqlen, size.head_dim) == (32768, 128)]
    assert ours == sorted(ours)
    first = {bench.name for bench, each, _ in items[: ours.count(0)] if each.stage == 0}
    assert first == {bench.name for bench in gpu_check.BENCHES} == set(goals.METHODS)
    named = Counter((bench.name, each.name, size) for bench, each, size in items)
    assert max(named.values()) == 1
    assert {b.name for b, each, _ in items if each.name in ("torch sdpa", "FlexAttention")} == {
        "full"
    }


CHILD = """
import os, pathlib, sys
first, mark = int(sys.argv[sys.argv.index("--first") + 1]), pathlib.Path(sys.argv[1])
for number in range(first, 4):
    mark.write_text(str(number))
    if number == 1:
        os._exit(9)
    print(number, flush=True)
    if number == 2:
        sys.exit(3)
"""
HANGS = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text("0")
time.sleep(60)
"""


def test_what_ends_a_child_costs_one_item(tmp_path: Path) -> None:
    mark, log, lost = tmp_path / "begun", tmp_path / "log", []
    words = [sys.executable, "-S", "-c", CHILD, str(mark)]
    end = time.monotonic() + 60
    assert relay.relay(words, mark, log, end, lambda *what: lost.append(what))
    assert log.read_text().split() == ["0", "2", "3"]
    # A child of status 3 has written its row itself.
    assert lost == [(1, "its process ended with status 9")]


def test_a_child_that_hangs_is_ended(tmp_path: Path) -> None:
    mark, lost = tmp_path / "begun", []
    words = [sys.executable, "-S", "-c", HANGS, str(mark)]
    end = time.monotonic() + 3
    assert not relay.relay(words, mark, tmp_path / "log", end, lambda *what: lost.append(what))
    assert lost == [(0, "time was up")]


def test_after_an_interrupt_no_child_follows(tmp_path: Path) -> None:
    code = "import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)"
    words, mark, lost = [sys.executable, "-S", "-c", code], tmp_path / "begun", []
    end = time.monotonic() + 60
    assert not relay.relay(words, mark, tmp_path / "log", end, lambda *what: lost.append(what))
    assert lost == []


def test_a_child_that_begins_nothing_is_an_error(tmp_path: Path) -> None:
    words = [sys.executable, "-S", "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(RuntimeError, match="before it began: no such thing"):
        relay.relay(words, tmp_path / "a", tmp_path / "b", time.monotonic() + 60, print)


def test_a_child_stops_in_time_and_when_cuda_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[int] = []
    mark = tmp_path / "begun"
    assert relay.take_turns([5, 6, 7], done.append, 1, mark, 60) == 0
    assert done == [6, 7] and mark.read_text() == "2"
    assert relay.take_turns([5], done.append, 0, mark, -1) == relay.LATE and done == [6, 7]
    monkeypatch.setattr(relay, "lost_cuda", lambda: True)
    assert relay.take_turns([5, 6], done.append, 0, mark, 60) == relay.HURT
    assert done == [6, 7, 5] and mark.read_text() == "0"


def test_rates_are_written_by_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last = len(gpu_check.kernel_items()) - 1
    bench, contender, _ = gpu_check.kernel_items()[last]
    if not HAS_GPU:
        assert gpu_check.child("kernels", tmp_path, last, 60) == 0
        assert [row["contender"] for row in read(tmp_path / f"{bench.name}.csv")] == [
            contender.name
        ]

    def lose(words: Any, mark: Path, log: Path, end: float, lost: Any) -> bool:
        lost(last, "its process ended with status -11")
        return True

    monkeypatch.setattr(gpu_check, "relay", lose)
    monkeypatch.setattr(gpu_check, "plots", lambda check: "no plots")
    check = gpu_check.Check(tmp_path, 1)
    said = gpu_check.kernel_rates(check, check.end)
    assert "1 of them without figures" in said and "complete" in said
    row = read(tmp_path / f"{bench.name}.csv")[-1]
    assert (row["contender"], row["note"]) == (contender.name, "its process ended with status -11")
    gpu_check.virtual_ranks(check, check.end) if last < len(gpu_ranks.OPERATORS) else None
    assert all(goal["verdict"] == "unmeasured" for goal in check.summary["goals"])


def test_a_step_that_fails_is_noted_and_a_folder_never_used_twice(tmp_path: Path) -> None:
    def fails(check: Any, end: float) -> str:
        raise RuntimeError("on purpose")

    out = gpu_check.unused(tmp_path / "out")
    check = gpu_check.Check(out, 1)
    check.step("ranks", fails)
    assert check.summary["steps"]["ranks"]["said"].startswith("failed: Traceback")
    assert "on purpose" in (out / "summary.json").read_text()
    assert gpu_check.unused(out) == tmp_path / "out-2"
    assert "time was up" in check.rows("some", ({"a": n} for n in range(3)), time.monotonic() - 1)
    assert len(read(out / "some.csv")) == 1


def made_row(contender: str, seqlen: int, ms: tuple[float, float], **more: Any) -> dict[str, Any]:
    size = gpu_harness.Size(seqlen, 32, 8, more.pop("head_dim", 128))
    row = gpu_harness.Rows().blank(replace(FULL, name=contender), size, "")
    rates = {"fwd_tflops": 400 * 20 / ms[0], "bwd_tflops": 400 * 50 / ms[1]}
    return {**row, "fwd_ms": ms[0], "bwd_ms": ms[1], **rates, "gpu": "made up", **more}


def test_goals_are_met_missed_or_unmeasured(tmp_path: Path) -> None:
    made = {
        "full": [
            made_row("lcdist full", 32768, (20.0, 62.5)),
            made_row("torch sdpa", 131072, (9, 9)),
            made_row("torch sdpa", 32768, (9, 9)),
            made_row("lcdist full impl=fa3", 32768, (10, 10)),
            made_row("lcdist full impl=cudnn", 32768, (9.1, 9.1)),
        ],
        "coca": [
            made_row("lcdist coca rotated", 32768, (21.0, 84.0)),
            made_row("lcdist full rotated", 32768, (20.0, 80.0)),
        ],
        "scca": [made_row("lcdist scca pattern=fixed", 32768, (25.0, 62.5))],
        "tensorized": [made_row("lcdist tensorized modes=(512,)", 131072, (0.5, 0.5))],
        # Of another GPU, and of another head_dim.
        "lssar": [made_row("lcdist lssar", 32768, (1.0, 1.0), gpu="another")],
        "landmark": [made_row("lcdist landmark", 32768, (1.0, 1.0), head_dim=64)],
    }
    for name, rows in made.items():
        harness.write(name, rows, tmp_path)
    found = {goal.what: goal for goal in goals.goals(tmp_path, "made up")}
    verdicts = {what: goal.verdict() for what, goal in found.items()}
    assert verdicts == {
        "full forward, TFLOP/s": "met",
        "full backward, TFLOP/s": "met",
        "full by a library / torch sdpa, TFLOP/s": "met",
        "coca / full, time, both rotated": "missed by 1.9 %",
        "scca fixed / full, TFLOP/s": "met",
        "scca flow / full, TFLOP/s": "unmeasured",
        "scca sda dilation=4 / full, TFLOP/s": "unmeasured",
        "scca longmixed / full, TFLOP/s": "unmeasured",
        "landmark / full, time": "unmeasured",
        "lssar / full, time": "unmeasured",
        "FlashAttention-2 / tensorized, time at 128k": "unmeasured",
        "torch sdpa / tensorized, time at 128k": "met",
    }
    ratio = found["scca fixed / full, TFLOP/s"].measured
    assert ratio is not None and abs(ratio - (20 + 62.5) / (25 + 62.5)) < 1e-12
    assert "missed by 1.9 %" in goals.table(tmp_path, "made up")


# --- virtual ranks --------------------------------------------------------------------------------


def test_errors_on_virtual_ranks_and_their_growth() -> None:
    size, cp_sizes = gpu_ranks.ranks_size()
    rows = list(gpu_ranks.rank_rows(gpu_ranks.OPERATORS[0], size, (*cp_sizes[:2], 5)))
    assert [row["cp_size"] for row in rows] == [*cp_sizes[:2], 5]
    for row in rows[:2]:
        assert list(row) == gpu_ranks.COLUMNS and not row["note"] and row["layout"] == "zigzag"
        assert all(0 < float(row[part]) < 5e-2 for part in gpu_ranks.PARTS)
        assert 0.2 < float(row["growth"]) < 5
    assert rows[2]["note"].startswith("ValueError: seqlen = ") and not rows[2]["out"]


@pytest.mark.parametrize("operator", gpu_ranks.OPERATORS, ids=str)
def test_every_method_is_cut_for_64_ranks(operator: Any) -> None:
    whole = replace(operator, trial={})
    layouts = [gpu_ranks.layout_of(whole, 8192, cp_size) for cp_size in (1, 2, 8, 64)]
    assert [layout.local_seqlen for layout in layouts] == [8192, 4096, 1024, 128]
    size, cp_sizes = gpu_ranks.ranks_size()
    assert all(gpu_ranks.layout_of(operator, size.seqlen, cp_size) for cp_size in cp_sizes)


def test_one_thread_at_a_time_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = [0], [0]

    def launch(kernel: Any, *args: Any, **words: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        inside[0] -= 1
        return kernel, args, words

    monkeypatch.setattr(gpu_ranks.JITFunction, "run", launch)
    run = gpu_ranks.JITFunction.run
    with gpu_ranks.one_thread_compiles():
        assert gpu_ranks.JITFunction.run("kernel", 1, grid=2) == ("kernel", (1,), {"grid": 2})
        threads = [
            threading.Thread(target=gpu_ranks.JITFunction.run, args=("k",)) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1] and gpu_ranks.JITFunction.run is run


# --- pictures, and make bench ---------------------------------------------------------------------


def test_a_picture_is_made_of_the_latest_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        made_row(name, n, (n / 4096, n / 2048), head_dim=d, commit="new")
        for name in ("lcdist full", "torch sdpa")
        for n in gpu_harness.LENGTHS
        for d in gpu_harness.HEAD_DIMS
    ]
    old = made_row("lcdist before", 4096, (1, 1), commit="old")
    untimed = {**rows[-1], "contender": "lost", "fwd_ms": "", "bwd_ms": ""}
    harness.write("full", [old, {**rows[0], "fwd_ms": 9}, *rows, untimed], tmp_path)
    harness.write("coca", [untimed], tmp_path)
    shown = plot.latest(read(tmp_path / "full.csv"))
    assert len(shown) == len(rows) and {row["commit"] for row in shown} == {"new"}
    assert shown[0]["fwd_ms"] == str(rows[0]["fwd_ms"])
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path)])
    assert plot.main() == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "full.png")]
    assert (tmp_path / "full.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "coca.png").exists()


@pytest.mark.parametrize("gpu", [False, True])
def test_make_bench_takes_the_scripts_of_the_machine(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    class Done:
        returncode = 1

    def run(words: list[str], check: bool) -> type[Done]:
        assert os.path.exists(words[1]) and not check
        begun.append(Path(words[1]).name)
        return Done

    monkeypatch.setattr(bench_all, "HAS_GPU", gpu)
    monkeypatch.setattr(bench_all.subprocess, "run", run)
    assert bench_all.main() == len(begun)
    scripts = [f"bench_{bench.name}.py" for bench in gpu_check.BENCHES]
    assert begun == ([*scripts, "plot.py"] if gpu else bench_all.ON_CPU)
    makefile = (ROOT / "Makefile").read_text()
    assert "$(BIN)/python kernels/bench/bench_all.py" in makefile

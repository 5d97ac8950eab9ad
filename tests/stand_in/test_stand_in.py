"""The way of a GPU without one: what kernels are given, and where the host waits for the device."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.stand_in.cuda import TORCH, compiled

ROOT = Path(__file__).parent.parent.parent
DEBUG = "configs/debug"
METHODS = ("full", "coca", "scca", "tensorized", "landmark", "lssar")
# The loss, the number of tokens and the gradient norm, read together.
WAITS = {"megatron.py: step"}

needs_the_device = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.cuda.is_available() or torch.version.cuda is not None,
        reason="this build of torch has CUDA itself",
    ),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
        reason="stands in for the functions of torch 2.13",
    ),
]
pytestmark = needs_the_device


def exhaustive(*values: Any) -> Any:
    """Return the values as parameters of the exhaustive tier."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("device"))


def run(library: Path, module: str, *words: str) -> list[str]:
    """Run a program and return its output lines."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "LD_LIBRARY_PATH": str(TORCH / "lib"),
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", f"tests.stand_in.{module}", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("rank", "impls"),
    [(3, ("triton",)), pytest.param(0, ("triton", "torch"), marks=pytest.mark.exhaustive)],
)
def test_attention(library: Path, rank: int, impls: tuple[str, ...]) -> None:
    *lines, last = run(library, "attention", str(rank), *impls)
    assert {line.split("-")[0].split("|")[0] for line in lines} == set(METHODS)
    for line in lines:
        *_, impl, kernels = line.split("|")
        assert (int(kernels) > 0) == (impl == "triton"), line
    # A forward and a backward never wait for the device.
    assert last == "waits|{}"


# Calls of our Python functions in a warm pass: some tenths of a millisecond on a slow core.
MOST_CALLS = 300
# Those for the descriptors of one mode.
MOST_OF_DESCRIPTORS = 30
# (Kernels, torch operations on the device), each of a forward and a backward pass.
OPERATIONS = {
    "coca": ((2, 4), (2, 0)),
    "landmark": ((1, 2), (0, 0)),
    "top_k": ((3, 2), (1, 2)),
    "top_k by token": ((5, 6), (1, 1)),
    "lssar": ((3, 4), (0, 0)),
}


def test_a_warm_call_launches_kernels_and_does_nothing_else(library: Path) -> None:
    *lines, cudnn = [json.loads(line) for line in run(library, "counts")]
    assert_few_python_calls([*lines, cudnn])
    assert_library_alone(cudnn)
    patterns = ("fixed", "flow", "sda", "longmixed")
    methods = ("full", "coca", "landmark", "top_k", "lssar")
    folded = {"tensorized (512)": (3, 3, 2), "tensorized (32, 32)": (5, 5, 3)}
    cases = [(line["of"], line["seqlen"]) for line in lines]
    assert cases == [
        *((name, seqlen) for name in (*patterns, *methods, *folded) for seqlen in (4096, 131072)),
        ("top_k by token", 4096),
        ("packed", 4096),
        ("layers", 8192),
    ]
    for line in lines:
        name, seqlen, *passes = line.values()
        if name in OPERATIONS:
            assert not any(x["cpu operations"] or x["copies"] for x in passes), line
            launched = tuple(sum(x["kernels"].values()) for x in passes)
            operations = tuple(len(x["device operations"]) for x in passes)
            assert (launched, operations) == OPERATIONS[name], line
            continue
        words = name if name == "full" else "tensorized" if name in folded else "pieces"
        counts = folded.get(name, (1, 1, 1))
        kernels = [
            {f"_{words}_fwd_kernel": counts[0]},
            {f"_{words}_bwd_{x}_kernel": n for x, n in zip(("dq", "dkv"), counts[1:], strict=True)},
        ]
        if name == "packed":
            kernels = [{"_rotate_kernel": 2} | each for each in kernels]
        if name == "layers":
            kernels = [{kernel: 32 for each in kernels for kernel in each}]
            # Where the longest programs of dk and dv are split, their parts are added.
            kernels[0]["_pieces_sum_kernel"] = 21
        idle = {"device operations": [], "device bytes": 0, "cpu operations": [], "copies": []}
        rest = [idle] * len(passes)
        if name in folded:
            # The bias' gradient: a sum over rows of 32 heads, fp32.
            modes, heads = counts[2] - 1, 32
            sums = {"device operations": ["aten.sum.dim_IntList"]}
            rest[1] = idle | sums | {"device bytes": 4 * modes * heads * (seqlen + 1)}
        expected = [{"kernels": a} | b for a, b in zip(kernels, rest, strict=True)]
        assert passes == expected, line


def assert_few_python_calls(lines: list[dict[str, Any]]) -> None:
    """Assert that the host does as much for a long sequence as for a short one; drop its counts.

    Fibres of tensorized attention that fill tiles, as the coarsest do in a long sequence, have
    descriptors, and others have not.
    """
    by_method: dict[str, list[list[int]]] = {}
    for line in lines:
        passes = [value for value in line.values() if isinstance(value, dict)]
        calls = [each.pop("python calls") for each in passes]
        by_method.setdefault(line["of"], []).append(calls)
    layers = by_method.pop("layers")
    # Forward and backward of 32 layers.
    assert 32 <= layers[0][0] <= 32 * 2 * MOST_CALLS
    for name, found in by_method.items():
        more = MOST_OF_DESCRIPTORS if name.startswith("tensorized") else 0
        assert all(max(x) - min(x) <= more for x in zip(*found, strict=True)), (name, found)
        assert min(found[0]) > 0 and max(map(max, found)) <= MOST_CALLS, (name, found)


def assert_library_alone(line: dict[str, Any]) -> None:
    """Assert that a warm call of cuDNN is its two operators, on key heads as they are."""
    assert (line["of"], line["seqlen"]) == ("cudnn", 4096)
    row = 4096 * 128 * 2
    lse = 4096 * 32 * 4
    # q and out, k and v; backward also dout, and the gradients.
    least = {"forward": row * (2 * 32 + 2 * 8) + lse, "backward": row * (4 * 32 + 4 * 8) + lse}
    for name, ending in (("forward", ""), ("backward", "_backward")):
        moved = line[name].pop("device bytes")
        assert least[name] <= moved <= least[name] + 16
        operation = f"aten._scaled_dot_product_cudnn_attention{ending}.default"
        nothing = {"kernels": {}, "cpu operations": [], "copies": []}
        assert line[name] == nothing | {"device operations": [operation]}


# Elementwise maps before and after a block: too short to hide a message behind.
MAPS = (
    "_merge_kernel",
    *("_rotate_kernel", "_coca_fwd_kernel", "_coca_bwd_kernel"),
    *("_row_dot_kernel", "_lssar_rows_kernel"),
    *("_lssar_directions_kernel", "_lssar_directions_bwd_kernel"),
)

# Llama 3.2 1B's output layer: tokens, vocabulary, hidden size, bytes of a number.
OUTPUT_LAYER = 16_384, 128_256, 2048, 2


@pytest.mark.parametrize("world_size", [1, exhaustive(2)])
def test_loss_and_update_read_once_what_they_need(library: Path, world_size: int) -> None:
    words = "0", str(world_size), f"{DEBUG}/full.toml"
    *of_loss, update = map(json.loads, run(library, "parts", *words))
    assert_logits_are_read_once_and_overwritten(of_loss, world_size)
    assert_gradients_are_read_for_the_norm_and_once_more(update, world_size)


def assert_logits_are_read_once_and_overwritten(
    lines: list[dict[str, Any]], world_size: int
) -> None:
    """Assert that the loss is few operations, and that it holds logits once, in their dtype."""
    kept, chunked, evaluated = lines
    tokens, vocab, hidden, size = OUTPUT_LAYER
    vocab //= world_size
    # Over ranks, lse and target logits are summed by some more operations on two numbers a token.
    more = 6 if world_size > 1 else 0
    for line, kernels, most in ((kept, 1, 8), (chunked, 4, 30), (evaluated, 1, 4)):
        assert not line["elsewhere"] and not line["waits"], line
        backward = {} if line is evaluated else {"_grad_kernel": kernels}
        assert line["kernels"] == {"_stats_kernel": kernels} | backward
        launched = sum(line["kernels"].values()) + len(line["operations"])
        assert launched <= most + more, (launched, line["operations"])
        assert line["widest"] <= (vocab * hidden if line is chunked else 2 * tokens)
    # Forward's product and two of backward, or one more for each chunk.
    products = [sum("mm" in name for name in line["operations"]) for line in (kept, chunked)]
    assert products == [3, 16]
    logits, dx, dw = size * tokens * vocab, size * tokens * hidden, size * vocab * hidden
    of_tokens = 16 * tokens
    assert kept["peak"] <= 1.02 * logits + dx + dw + of_tokens
    assert evaluated["peak"] <= 1.02 * logits + of_tokens
    # In four chunks the weight's gradient is summed in fp32, and rounded at the end.
    assert chunked["peak"] <= max(1.02 * logits / 4, dw) + dx + 2 * dw + of_tokens


def assert_gradients_are_read_for_the_norm_and_once_more(
    line: dict[str, Any], world_size: int
) -> None:
    """Assert that an update is few operations, a read of the gradients, and one kernel."""
    assert line["kernels"] == {"_adamw_kernel": 1}
    # The host reads four numbers at once, which the stand-in does one by one. Over ranks, owners
    # broadcast their weights.
    operations = [name for name in line["operations"] if "_local_scalar_dense" not in name]
    if world_size == 1:
        assert len(operations) + 1 + 1 <= 8, operations
        # Gradients in fp32, and some numbers. The kernel moves 30 bytes a parameter.
        assert line["bytes"] <= 4.1 * line["parameters"], line
    assert not any(word in name for name in operations for word in ("pow", "mul_", "_to_copy"))
    assert not line["elsewhere"]
    assert set(line["waits"]) == WAITS, line


@pytest.mark.exhaustive
def test_a_second_run_launches_no_attention_and_sends_nothing(library: Path) -> None:
    maps = {*MAPS, "_lssar_directions_kernel"}
    for line in map(json.loads, run(library, "second_run", "1")):
        first, second = line["runs"]
        assert set(first["launches"]) - maps, line
        assert bool(first["sent"]) == (line["cp_size"] > 1), line
        assert set(second["launches"]) <= maps and not second["sent"], line

"""The benchmark of the tiled MLP, tried at a tiny size: rows, and a gate that sees a fault."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from tests.distributed import run_ranks

sys.path.append(str(Path(__file__).parents[2] / "kernels" / "bench"))
bench_memory: Any = import_module("bench_memory")

TINY = (800, 128, 96)


def tried(rank: int, world_size: int) -> tuple[str | None, str | None, list[dict[str, object]]]:
    """Return the gate's answer without and with a planted fault, and the rows."""
    sound, rows = bench_memory.gate(*TINY), bench_memory.rows(*TINY, 1)
    sequence_tiled: Callable[..., Any] = bench_memory.sequence_tiled
    bench_memory.sequence_tiled = lambda half, x, size: sequence_tiled(half, x, size) - x / 2
    return sound, bench_memory.gate(*TINY), rows


def test_the_gate_stands_before_rows() -> None:
    [(sound, broken, rows)] = run_ranks(tried, 1)
    assert sound is None
    assert broken is not None and broken.startswith("tiles of 25 is off by ")
    assert [row["contender"] for row in rows] == [
        "whole",
        "whole, twice",
        "tiles of 25",
        "tiles of 100",
    ]
    assert rows[0]["over_whole"] == 1 and all(float(str(row["cpu_ms"])) > 0 for row in rows)

"""Operations and bytes of a training step: the limits of each place, counted without a GPU."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.stand_in.test_stand_in import library, needs_the_device, run

__all__ = ["library"]
pytestmark = needs_the_device

# Llama-3.2-1B's shape, 16,384 tokens on one GPU, nothing recomputed.
REFERENCE = " ".join(
    [
        "configs/debug/full.toml model.vocab_size=128256 model.num_layers=16",
        "model.hidden_size=2048 model.nheads=32 model.nheads_kv=8 model.ffn_hidden_size=8192",
        "model.tied_embeddings=true train.seqlen=16384 train.global_batch_size=1 train.steps=2",
        "train.recompute=none optim.warmup_steps=0",
    ]
)
GB = 10**9


def counted(library: Path, world_size: int, *cases: str) -> list[dict[str, Any]]:
    """Return what `moved` counts of each configuration, on rank 0."""
    return [json.loads(line) for line in run(library, "moved", "0", str(world_size), *cases)]


def total(rows: list[list[Any]]) -> tuple[int, float]:
    """Return launches and gigabytes of some rows."""
    return sum(row[2] for row in rows), sum(row[3] for row in rows) / GB


def by_operation(rows: list[list[Any]]) -> Counter[str]:
    """Return the number of launches of each operation."""
    found: Counter[str] = Counter()
    for _, name, launches, _ in rows:
        found[name] += launches
    return found


def test_a_step_of_the_reference_shape(library: Path) -> None:
    [found] = counted(library, 1, REFERENCE)
    launches, moved = total(found["other"])
    assert moved <= 545, found["other"][:12]
    everything = sum(total(found[kind])[0] for kind in ("product", "attention", "other"))
    assert everything <= 2500, everything
    swiglu, norms = shares(found["other"])
    # z and gate_up once each way, dz and dgate_up: 8 tensors of the MLP's width in 16 layers.
    assert swiglu == (2 * 16, pytest.approx(34.4, abs=0.05))
    # A layer has 3 launches forward, 2 and 2 small ones backward; the final norm 1, and 1 and 1.
    assert norms[0] == 7 * 16 + 3 and norms[1] <= 19.1, norms


def shares(rows: list[list[Any]]) -> list[tuple[int, float]]:
    """Return launches and gigabytes of SwiGLU, and of norms with the residual."""
    names = "_swiglu_", "_norm_"
    found = [[row for row in rows if row[1].startswith(name)] for name in names]
    found[1] += [row for row in rows if row[0].startswith("layer.py") and row[1] == "add"]
    return [total(each) for each in found]

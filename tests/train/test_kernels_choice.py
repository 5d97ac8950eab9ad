"""`train.kernels`: the same training whatever computes norms, updates and weight gradients."""

import pytest

from lcdist.config import ConfigError
from tests.distributed import run_ranks
from tests.kernels.apex_stand_ins import StandIns, apex_installed
from tests.model.small import Meshes, small, take_steps


def steps_by(rank: int, world_size: int) -> dict[str, tuple[list[tuple[float, float]], set[str]]]:
    """Return losses and norms of some steps, and the parts of apex that were called, by choice."""
    meshes, found = Meshes(), {}
    for kernels in ("auto", "torch", "apex"):
        with apex_installed(StandIns(), kernels) as stand_ins:
            trainer = meshes.trainer(
                small(f"train.kernels={kernels}", "train.dtype=bf16", "train.recompute=selective")
            )
            stand_ins.calls.clear()
            found[kernels] = take_steps(trainer, 3), set(stand_ins.calls)
    return found


def test_apex_trains_as_torch_does() -> None:
    found = run_ranks(steps_by, 1)[0]
    assert found["auto"] == found["torch"] and not found["auto"][1]
    steps, called = found["apex"]
    assert called == {"weights", "norm", "adamw"}
    for got, expected in zip(steps, found["auto"][0], strict=True):
        assert got == pytest.approx(expected, rel=3e-3)


def refused(rank: int, world_size: int) -> str:
    with pytest.raises(ConfigError) as caught:
        Meshes().trainer(small("train.kernels=apex"))
    return str(caught.value)


def test_apex_that_is_missing_is_refused_in_one_line() -> None:
    message = run_ranks(refused, 1)[0]
    assert message.startswith(
        "train.kernels = 'apex': this machine lacks weights (fused_weight_gra"
    )
    assert message.endswith("or set train.kernels to 'auto', 'own' or 'torch'")
    assert "\n" not in message

"""`train.kernels`: the same training whatever computes norms, updates and weight gradients."""

import contextlib
from pathlib import Path

import pytest

from lcdist.config import ConfigError
from lcdist_kernels.step_kernels import choose_step_kernels, step_kernels
from tests.distributed import run_ranks
from tests.engines.internals import let_go
from tests.kernels.apex_stand_ins import StandIns, apex_installed, package_apex
from tests.kernels.transformer_engine_stand_in import StandIn, transformer_engine_installed
from tests.model.small import Meshes, small, take_steps


def steps_by(rank: int, world_size: int) -> dict[str, tuple[list[tuple[float, float]], set[str]]]:
    """Return losses and norms of some steps, and which stand-ins were called, by choice."""
    meshes, found = Meshes(), {}
    for kernels in ("auto", "torch", "apex", "te"):
        with installed_for(kernels) as stand_ins:
            trainer = meshes.trainer(
                small(f"train.kernels={kernels}", "train.dtype=bf16", "train.recompute=selective")
            )
            stand_ins.calls.clear()
            found[kernels] = take_steps(trainer, 3), set(stand_ins.calls)
    return found


def installed_for(kernels: str) -> contextlib.AbstractContextManager[StandIns | StandIn]:
    """Return a block in which stand-ins of apex, or of Transformer Engine for "te", are found."""
    if kernels == "te":
        return transformer_engine_installed(StandIn(), kernels)
    return apex_installed(StandIns(), kernels)


def test_apex_and_transformer_engine_train_as_torch_does() -> None:
    found = run_ranks(steps_by, 1)[0]
    assert found["auto"] == found["torch"] and not found["auto"][1]
    for kernels, parts in (("apex", {"weights", "norm", "adamw"}), ("te", {"fwd", "bwd"})):
        steps, called = found[kernels]
        assert called == parts
        for got, expected in zip(steps, found["auto"][0], strict=True):
            assert got == pytest.approx(expected, rel=3e-3)


def steps_under_deepspeed(
    rank: int, world_size: int
) -> dict[str, tuple[list[tuple[float, float]], set[str], str]]:
    """Return steps, called parts of apex and the choice in force, by `train.kernels`."""
    meshes, found = Meshes(), {}
    for kernels in ("torch", "own", "apex", "te"):
        with installed_for(kernels) as stand_ins:
            # The trainer chooses.
            choose_step_kernels("auto")
            words = (f"train.kernels={kernels}", "train.engine=deepspeed", "deepspeed.stage=1")
            trainer = meshes.trainer(small(*words, "model.num_layers=2"))
            stand_ins.calls.clear()
            steps = take_steps(trainer, 2)
            found[kernels] = steps, set(stand_ins.calls), step_kernels()
            let_go(trainer)
    return found


def test_the_choice_holds_under_deepspeed() -> None:
    found = run_ranks(steps_under_deepspeed, 1)[0]
    assert [choice for _, _, choice in found.values()] == list(found)
    # The weight gradients and AdamW are torch's.
    assert [called for _, called, _ in found.values()] == [set(), set(), {"norm"}, {"fwd", "bwd"}]
    assert found["own"][0] == found["torch"][0]
    for kernels in ("apex", "te"):
        for got, expected in zip(found[kernels][0], found["torch"][0], strict=True):
            assert got == pytest.approx(expected, rel=1e-5)


def refused(rank: int, world_size: int, folder: Path) -> tuple[str, str, str]:
    """Return what is said without any apex, with the other project of that name, and without TE."""
    said, meshes = [], Meshes()
    for files in ((), ("views/__init__.py",)):
        with contextlib.ExitStack() as stack:
            if files:
                stack.enter_context(package_apex(folder, *files))
            caught = stack.enter_context(pytest.raises(ConfigError))
            meshes.trainer(small("train.kernels=apex"))
        said.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        meshes.trainer(small("train.kernels=te"))
    return said[0], said[1], str(caught.value)


def test_what_is_missing_is_refused_in_one_line(tmp_path: Path) -> None:
    message, with_other, without_te = run_ranks(refused, 1, tmp_path)[0]
    other = f"the installed package apex ({tmp_path}/apex/__init__.py) is another project, not NV"
    assert f" ({other}IDIA's); build NVIDIA's apex with" in with_other
    assert "\n" not in with_other and "another project" not in message
    assert message.startswith(
        "train.kernels = 'apex': this machine lacks weights (fused_weight_gra"
    )
    assert message.endswith("or set train.kernels to 'auto', 'own' or 'torch'")
    assert "\n" not in message
    assert without_te == (
        "train.kernels = 'te': this machine lacks norm (transformer_engine_torch: No module named "
        "'transformer_engine'); install transformer-engine[pytorch] for this build of torch, or "
        "set train.kernels to 'auto', 'own' or 'torch'"
    )

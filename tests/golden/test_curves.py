"""A whole run keeps its numbers: over versions of the code, and over meshes."""

import json
from functools import cache

import pytest

from tests.distributed import run_ranks
from tests.golden.curves import STEPS, curve, golden_file, names
from tests.model.small import Meshes, mesh_name

TOLERANCE = 1e-5
TP, PP, CP = "parallel.tp_size=2", "parallel.pp_size=2", "parallel.cp_size=2"
SP, VP = "parallel.sequence_parallel=true", "parallel.vp_size=2"
# As few micro-batches as the mesh allows; a pipeline has one for each of its stages.
MESHES: dict[tuple[int, tuple[str, ...]], int] = {
    (1, ()): 1,
    (4, ()): 1,
    (4, (CP,)): 2,
    (4, (TP, SP)): 2,
    (4, (PP, VP)): 1,
    (4, (TP, CP, SP)): 4,
    (4, (TP, PP)): 2,
    (4, (PP, CP)): 2,
}


# The quickstart is a larger model: it is run as the main job runs it.
QUICKSTART = {(2, (CP,)): 2}


# `tests/model` compares every method's gradients on these meshes and others. Here full attention's
# whole runs are compared on all meshes, other methods' on one: one process would show no more,
# because the mesh has to give the numbers of one process.
OTHER_METHODS = {case: MESHES[case] for case in ((4, (TP, CP, SP)),)}
# One process takes all steps, and so does the quickstart: warmup, decay and the data's order do not
# depend on the mesh.
STEPS_OF_FOUR_RANKS = 8


def meshes_of(name: str) -> dict[tuple[int, tuple[str, ...]], int]:
    """(world size, mesh) to micro-batch size."""
    if name.startswith("quickstart"):
        return QUICKSTART
    return MESHES if name == "debug/full" else OTHER_METHODS


CASES = [(name, *case) for name in names() for case in meshes_of(name)]


def chosen(name: str, world_size: int) -> list[tuple[str, ...]]:
    return [mesh for size, mesh in meshes_of(name) if size == world_size]


def all_curves(rank: int, world_size: int, name: str) -> list[dict[str, list[float]]]:
    meshes = Meshes()
    sizes = meshes_of(name)
    steps = STEPS_OF_FOUR_RANKS if world_size == 4 else STEPS
    return [
        curve(name, (*mesh, f"train.micro_batch_size={sizes[world_size, mesh]}"), meshes, steps)
        for mesh in chosen(name, world_size)
    ]


@cache
def found(name: str, world_size: int) -> dict[tuple[str, ...], dict[str, list[float]]]:
    """Return the curves on rank 0; every mesh of this world size in one launch."""
    curves = run_ranks(all_curves, world_size, name, timeout=300)
    assert all(other == curves[0] for other in curves), "ranks report different numbers"
    return dict(zip(chosen(name, world_size), curves[0], strict=True))


# What the curves add to `tests/model`: a whole run's numbers do not change.
DEFAULT = ("debug/full",)


@pytest.mark.parametrize(
    ("name", "world_size", "mesh"),
    [
        pytest.param(
            name,
            world_size,
            mesh,
            id=f"{name}-{world_size}ranks-{mesh_name(mesh)}",
            marks=() if world_size == 1 and name in DEFAULT else pytest.mark.exhaustive,
        )
        for name, world_size, mesh in CASES
    ],
)
def test_first_steps_are_the_golden_ones(name: str, world_size: int, mesh: tuple[str, ...]) -> None:
    golden = json.loads(golden_file(name).read_text(encoding="utf-8"))
    curve = found(name, world_size)[mesh]
    for key in ("loss", "grad_norm"):
        assert len(curve[key]) == (STEPS_OF_FOUR_RANKS if world_size == 4 else STEPS)
        assert curve[key] == pytest.approx(golden[key][: len(curve[key])], rel=TOLERANCE), key

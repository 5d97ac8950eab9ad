"""A whole run keeps its numbers: over versions of the code, and over meshes."""

import json
from functools import cache

import pytest

from tests.distributed import run_ranks
from tests.golden.curves import CONFIGS, curve, golden_file
from tests.model.small import Meshes, mesh_name

TOLERANCE = 1e-5
NAMES = sorted(file.stem for file in CONFIGS.glob("*.toml"))
TP, PP, CP = "parallel.tp_size=2", "parallel.pp_size=2", "parallel.cp_size=2"
SP, VP = "parallel.sequence_parallel=true", "parallel.vp_size=2"
MESHES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (1, ()),
    (4, ()),
    (4, (CP,)),
    (4, (TP, SP)),
    (4, (PP, VP)),
    (4, (TP, CP, SP)),
    (4, (TP, PP)),
    (4, (PP, CP)),
)


def all_curves(rank: int, world_size: int, name: str) -> list[dict[str, list[float]]]:
    meshes = Meshes()
    chosen = [mesh for size, mesh in MESHES if size == world_size]
    return [curve(name, mesh, meshes) for mesh in chosen]


@cache
def found(name: str, world_size: int) -> dict[tuple[str, ...], dict[str, list[float]]]:
    """The curves on rank 0; every mesh of this world size in one launch."""
    curves = run_ranks(all_curves, world_size, name, timeout=300)
    assert all(other == curves[0] for other in curves), "ranks report different numbers"
    chosen = [mesh for size, mesh in MESHES if size == world_size]
    return dict(zip(chosen, curves[0], strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("world_size", "mesh"), MESHES, ids=[f"{n}ranks-{mesh_name(m)}" for n, m in MESHES]
)
def test_twenty_steps(name: str, world_size: int, mesh: tuple[str, ...]) -> None:
    golden = json.loads(golden_file(name).read_text(encoding="utf-8"))
    curve = found(name, world_size)[mesh]
    for key in ("loss", "grad_norm"):
        assert curve[key] == pytest.approx(golden[key], rel=TOLERANCE), key

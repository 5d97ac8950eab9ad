"""Every attention method inside the model: one function on every mesh, gradients included."""

from functools import cache
from typing import Any

import pytest

from lcdist.attention import METHODS
from tests.model.cases import Case, assert_same_gradients, run_cases

TP, PP, CP = (f"parallel.{axis}_size=2" for axis in ("tp", "pp", "cp"))
MESHES = [(TP, CP, "parallel.sequence_parallel=true"), (PP, CP), (TP, PP)]
# Small sizes, so that a row of 96 tokens has chunks, blocks and borders on every rank.
VARIANTS: dict[str, list[tuple[str, ...]]] = {
    "lssar": [("attention.power=3",)],
}
PACKED = ("data.documents=pack",)
MIXED = ("attention.layers=coca@1 lssar@-1", "attention.lssar.reweight=false")


def cases() -> list[Case]:
    """Every method with each of its variants on the meshes, and a model of several methods."""
    found = []
    for name in METHODS:
        method = f"attention.method={name}"
        for number, variant in enumerate(VARIANTS.get(name, [()])):
            packed = PACKED if number % 2 == 0 else ()
            shape = (method, *variant, *packed, "train.seqlen=96")
            found += [Case(4, mesh, shape) for mesh in MESHES]
    for mesh in ((PP, CP, "parallel.vp_size=2"), (TP, CP)):
        found.append(Case(4, mesh, (*MIXED, "train.seqlen=96"), samples=8))
    return found


CASES = cases()


@cache
def results(world_size: int) -> dict[Case, list[Any]]:
    """What every rank found; world size 1 has the references."""
    chosen = CASES if world_size == 4 else {case.reference for case in CASES}
    return run_cases(world_size, chosen)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_those_of_one_process(case: Case) -> None:
    assert_same_gradients(results(4)[case], results(1)[case.reference])

"""Initial weights that every rank draws alone, as on GPUs: the same on every mesh, and normal."""

import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lcdist.model import init
from tests.distributed import run_ranks
from tests.model.small import Meshes, small
from tests.model.whole import gather_weights

MESHES = ((), ("parallel.tp_size=2", "parallel.sequence_parallel=true"), ("parallel.pp_size=2",))


def drawn(rank: int, world_size: int) -> list[dict[str, Tensor]]:
    """Return the initial weights of each mesh, drawn in place on every rank."""
    meshes = Meshes()
    with patch.object(init, "_draws_in_place", lambda parameter: True):
        return [gather_weights(meshes.trainer(small(*mesh)).engine) for mesh in MESHES]


def test_shards_drawn_in_place_are_those_of_one_model() -> None:
    whole, *others = run_ranks(drawn, 2)[0]
    for weights in others:
        assert weights.keys() == whole.keys()
        assert all(torch.equal(weights[name], whole[name]) for name in whole)
    for name, weight in whole.items():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight)), name
            continue
        writes_residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        expected = 0.02 / math.sqrt(2 * 4) if writes_residual else 0.02
        assert weight.std().item() == pytest.approx(expected, rel=0.05), name
    matrices = [weight for weight in whole.values() if weight.ndim == 2]
    assert len(torch.cat([x.flatten()[:50] for x in matrices]).unique()) == 50 * len(matrices)

"""Two runs of the same steps give the same bits, with context parallelism and on a GPU as well."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lcdist.hardware.determinism import WORKSPACE, make_deterministic
from lcdist.plan import make_plan
from tests.distributed import run_ranks
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import digest, gather_weights

METHODS: dict[str, tuple[str, ...]] = {
    "full": (),
    "coca": ("attention.method=coca",),
    "scca": ("attention.method=scca", "attention.chunk_size=16"),
    "tensorized": ("attention.method=tensorized", "attention.modes=[4]"),
    "landmark": ("attention.method=landmark", "attention.block_size=8"),
    "lssar": ("attention.method=lssar",),
}


@pytest.fixture
def restored() -> Iterator[None]:
    """Turn the mode off afterwards."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    make_deterministic(False)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if before is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = before


def bits_of(*overrides: str) -> str:
    """Take three steps from the beginning; return a digest of weights and losses."""
    trainer = Meshes().trainer(small("model.num_layers=2", *overrides))
    losses = take_steps(trainer, 3)
    return f"{digest(gather_weights(trainer.engine))} {losses}"


def bits_of_methods(rank: int, world_size: int, mesh: tuple[str, ...]) -> dict[str, list[str]]:
    make_deterministic(True)
    words = ("train.deterministic=true", *mesh)
    return {name: [bits_of(*more, *words) for _ in "ab"] for name, more in METHODS.items()}


@pytest.mark.parametrize(
    "mesh",
    [
        ("parallel.cp_size=2",),
        pytest.param(("parallel.tp_size=2",), marks=pytest.mark.exhaustive),
        pytest.param((), marks=pytest.mark.exhaustive),
    ],
    ids=["cp2", "tp2", "dp2"],
)
def test_two_runs_give_the_same_bits(mesh: tuple[str, ...]) -> None:
    for found in run_ranks(bits_of_methods, 2, mesh):
        for name, (first, second) in found.items():
            assert first == second, name


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_two_runs_on_a_gpu_give_the_same_bits(method: str, restored: None) -> None:
    make_deterministic(True)
    words = (*METHODS[method], "train.deterministic=true", "train.dtype=bf16")
    assert bits_of(*words) == bits_of(*words)


def test_the_flag_reaches_torch_and_cublas(restored: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    make_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == WORKSPACE
    make_deterministic(False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_library_that_adds_in_any_order_is_refused() -> None:
    words: list[Any] = ["train.deterministic=true", "train.dtype=bf16", "attention.impl=fa3"]
    with pytest.raises(ValueError, match=r"attention.impl = 'fa3' with train.deterministic = true"):
        make_plan(small(*words), 1)

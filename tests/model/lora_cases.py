"""Runs with adapters on a mesh: their steps, gradients and weights, whole and by name."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import lcdist.model.init as init
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import gather_gradients, gather_weights

EVERY = 'lora.targets=["q","k","v","o","gate","up","down"]'
LORA = ("lora.rank=3", EVERY)
WHOLE = ("lora.embeddings=true", "lora.norms=true", "lora.head=true")
TP, PP, CP = "parallel.tp_size=2", "parallel.pp_size=2", "parallel.cp_size=2"
SP, INTERLEAVED = "parallel.sequence_parallel=true", "parallel.vp_size=2"


@dataclass(frozen=True)
class Steps:
    """Hold (loss, gradient norm) by step, the first step's gradients, and the last weights."""

    numbers: list[tuple[float, float]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def some_b() -> Any:
    """While it lasts, B is drawn too, small: with B at 0 an A has no gradient."""
    plain = init._draw_adapter

    def drawn(name: str, shape: list[int], seed: int) -> Tensor:
        if name.endswith(".A"):
            return plain(name, shape, seed)
        return torch.randn(shape, generator=init._generator(name, seed)) / 64

    return mock.patch.object(init, "_draw_adapter", drawn)


def steps(rank: int, world_size: int, cases: list[tuple[str, ...]]) -> list[Steps]:
    """Three steps of each case, with other learning rates for B and a norm that is clipped.

    A large eps keeps Adam from making whole steps of gradients that are rounding noise.
    """
    how = ("lora.lr_ratio=4", "optim.clip_norm=0.05", "optim.eps=1e-3")
    meshes, found = Meshes(), []
    for words in sorted(cases):
        with some_b():
            trainer = meshes.trainer(small(*words, *how))
        engine = trainer.engine
        loss = engine.forward_backward(trainer.loader.next_step()).mean
        gradients = gather_gradients(engine)
        numbers = [(loss, engine.step(1e-3)), *take_steps(trainer, 2, 1e-3)]
        found.append(Steps(numbers, gradients, gather_weights(engine)))
    return found

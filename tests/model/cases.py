"""A mesh and a variant of the small model, run once on every rank: what mesh tests compare."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from lcdist.data.loader import Batch
from lcdist.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.model.small import Meshes, ShortSamples, mesh_name, small
from tests.model.whole import digest, gather_gradients, gather_weights
from tests.tolerance import assert_matches

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A mesh and a variant of the model and its batch.

    shape: overrides that change the function; how: overrides that must not. text: tokens of a
    sample, where fewer than train.seqlen. holes: every other sample is left out of the loss.
    samples: of the global batch.
    """

    world_size: int
    mesh: tuple[str, ...]
    shape: tuple[str, ...]
    how: tuple[str, ...] = ()
    text: int | None = None
    holes: bool = False
    samples: int = 4

    @property
    def reference(self) -> "Case":
        return Case(1, (), self.shape, (), self.text, self.holes, self.samples)

    def __str__(self) -> str:
        words = [word.split(".")[-1].split("=")[-1] for word in (*self.shape, *self.how)]
        extra = ["text"] * bool(self.text) + ["holes"] * self.holes
        world = self.world_size
        return "-".join([f"{world}ranks", mesh_name(self.mesh), *words, *extra])


def shows_weights(case: Case) -> bool:
    """Return whether initial weights are compared: in one of a mesh's two rows, to save time."""
    return case == case.reference or "train.recompute=none" in case.how


def with_holes(batches: list[Batch], trainer: Trainer) -> list[Batch]:
    """Mask the loss of every odd sample."""
    spec = trainer.loader.spec
    for micro, batch in enumerate(batches):
        first = (micro * spec.dp_size + spec.dp_rank) * spec.micro_batch_size
        for row in range(spec.micro_batch_size):
            if (first + row) % 2:
                batch.loss_mask[row] = 0
    return batches


def differentiate(case: Case, meshes: Meshes) -> tuple[float, int, str, dict[str, Tensor]]:
    """(loss, tokens, digest of initial weights, gradients); the last two on rank 0 alone."""
    config = small(*case.mesh, *case.shape, *case.how, f"train.global_batch_size={case.samples}")
    text = ShortSamples(250, case.text, seed=3) if case.text else None
    trainer = meshes.trainer(config, text)
    batches = trainer.loader.next_step()
    if case.holes:
        batches = with_holes(batches, trainer)
    initial = gather_weights(trainer.engine) if shows_weights(case) else {}
    loss = trainer.engine.forward_backward(batches)
    return loss.mean, loss.tokens, digest(initial), gather_gradients(trainer.engine)


def differentiate_all(rank: int, world_size: int, cases: list[Case]) -> list[Any]:
    meshes = Meshes()
    return [differentiate(case, meshes) for case in sorted(cases, key=lambda case: case.mesh)]


@cache
def results(cases: tuple[Case, ...], world_size: int) -> dict[Case, list[Any]]:
    """Return every rank's results in the `cases` of this world size.

    One process also runs the references of all cases.
    """
    chosen = {case for case in cases if case.world_size == world_size}
    if world_size == 1:
        chosen |= {case.reference for case in cases}
    return run_cases(world_size, chosen)


def tiers(default: Iterable[Case], exhaustive: Iterable[Case]) -> list[Any]:
    """Return test parameters (cases of the tier, case); those of the second tier are exhaustive.

    `results` runs all cases of a tier in one launch per world size.
    """
    small, full = tuple(dict.fromkeys(default)), tuple(dict.fromkeys(exhaustive))
    full = tuple(case for case in full if case not in small)
    return [
        *(pytest.param(small, case, id=str(case)) for case in small),
        *(pytest.param(full, case, id=str(case), marks=pytest.mark.exhaustive) for case in full),
    ]


def run_cases(world_size: int, cases: Iterable[Case]) -> dict[Case, list[Any]]:
    """Run all cases in one launch; return every rank's results by case."""
    ordered = sorted(set(cases), key=lambda case: case.mesh)
    answers = run_ranks(differentiate_all, world_size, ordered, timeout=240)
    return {case: [answer[i] for answer in answers] for i, case in enumerate(ordered)}


def assert_same_gradients(ranks: list[Any], reference: list[Any]) -> None:
    """Assert that losses on all ranks and all gradients equal those of one process."""
    [(loss, tokens, _, gradients)] = reference
    for rank_loss, rank_tokens, _, _ in ranks:
        assert rank_tokens == tokens
        assert rank_loss == pytest.approx(loss, rel=TOLERANCE)
    whole = ranks[0][3]
    assert whole.keys() == gradients.keys()
    for name, expected in gradients.items():
        assert expected.count_nonzero(), f"the gradient of {name} proves nothing"
        assert_matches(whole[name], expected, TOLERANCE)

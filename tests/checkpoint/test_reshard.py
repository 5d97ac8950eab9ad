"""A checkpoint of any mesh loads on any other: the same bits, the same samples, the same losses."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lcdist.checkpoint.read import open_checkpoint
from lcdist.checkpoint.save import Checkpointer
from lcdist.config.schema import Config
from lcdist.train.trainer import Trainer
from tests.distributed import run_ranks
from tests.engines.internals import chunks_of, optimizer_of
from tests.model.small import Meshes, mesh_name, small, take_steps
from tests.model.whole import digest, gather_moments, gather_weights

TP, PP, CP = "parallel.tp_size=2", "parallel.pp_size=2", "parallel.cp_size=2"
SP, VP, TP3 = "parallel.sequence_parallel=true", "parallel.vp_size=2", "parallel.tp_size=3"
BEFORE, AFTER = 3, 3
VOCAB = 250


class Mesh(NamedTuple):
    """A world and overrides."""

    world_size: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.world_size}ranks-{mesh_name(self.words)}"


Tier = tuple[tuple[str, Mesh, Mesh], ...]
ONE, DP4, TP3_SP = Mesh(1, ()), Mesh(4, ()), Mesh(3, (TP3, SP))
CP_DP, PP_CP, TP_CP = Mesh(4, (CP,)), Mesh(4, (PP, CP)), Mesh(4, (TP, CP, SP))
TP_PP, PP_VP, TP_PP_VP = Mesh(4, (TP, PP, SP)), Mesh(4, (PP, VP)), Mesh(4, (PP, VP, TP))

# Where a checkpoint was written, and where it is read. Three tensor-parallel ranks pad the
# vocabulary to 384 rows, all others to 256.
PAIRS: dict[str, dict[Mesh, list[Mesh]]] = {
    "untied": {
        ONE: [ONE, TP3_SP, CP_DP, TP_PP],
        TP_PP: [ONE, TP3_SP, CP_DP, TP_PP],
        CP_DP: [ONE, DP4, TP_CP],
    },
    "tied": {
        ONE: [PP_CP],
        PP_CP: [ONE, PP_VP],
        TP_PP_VP: [ONE, TP3_SP, TP_PP_VP],
    },
    # Tensorized attention learns a bias of its own, in layers 0, 1 and 3 of four.
    "extras": {
        ONE: [TP3_SP, PP_CP],
        TP_PP: [ONE, TP_CP],
        CP_DP: [TP_PP_VP],
    },
}
ALL = [(k, src, dst) for k, of in PAIRS.items() for src, dsts in of.items() for dst in dsts]
# By default to fewer ranks, and between two meshes of four.
DEFAULT: Tier = (("untied", TP_PP, ONE), ("tied", PP_CP, PP_VP))
DEFAULT += (("extras", TP_PP, TP_CP),)
EXHAUSTIVE = tuple(case for case in ALL if case not in DEFAULT)
TIERS = [
    *(pytest.param(DEFAULT, *case) for case in DEFAULT),
    *(pytest.param(EXHAUSTIVE, *case, marks=pytest.mark.exhaustive) for case in EXHAUSTIVE),
]


def name(value: Any) -> str:
    """Return the id of an argument; nothing for a whole tier."""
    return "" if isinstance(value, tuple) and not isinstance(value, Mesh) else str(value)


class Standing(NamedTuple):
    """Hold where a run stands: digests of whole tensors (rank 0), counts, losses to come."""

    weights: str
    moments: str
    updates: int
    step: int
    sample: int
    losses: list[float]


def config_for(kind: str, mesh: Mesh) -> Config:
    model = ["model.nheads=6", "model.nheads_kv=6", "model.head_dim=8", "model.hidden_size=48"]
    model += [f"model.tied_embeddings={'true' if kind == 'tied' else 'false'}"]
    if kind == "extras":
        model += ["attention.method=tensorized", "attention.modes=[4]", "attention.layers=full@2"]
    # A batch that four data-parallel ranks can share, interleaved or not.
    return small(*model, *mesh.words, "train.global_batch_size=12", "train.micro_batch_size=3")


def standing(trainer: Trainer) -> Standing:
    """All ranks call it; takes AFTER more steps."""
    engine = trainer.engine
    weights, moments = gather_weights(engine), gather_moments(engine)
    for tensor in (*weights.values(), *moments.values()):
        assert tensor.isfinite().all()
    updates = optimizer_of(trainer).steps
    step, sample = trainer.step, trainer.loader.sample
    losses = [loss for loss, _ in take_steps(trainer, AFTER)]
    return Standing(
        digest(words_only(weights)), digest(words_only(moments)), updates, step, sample, losses
    )


def words_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the rows that pad the vocabulary, whose number depends on the mesh."""
    tables = ("word_embeddings.weight", "output_layer.weight")
    return {k: t[:VOCAB] if k.endswith(tables) else t for k, t in tensors.items()}


def save_all(
    rank: int, world_size: int, folder: Path, cases: Tier
) -> dict[tuple[str, Mesh], Standing]:
    meshes, found = Meshes(), {}
    written = dict.fromkeys((kind, source) for kind, source, _ in cases)
    for kind, mesh in [(kind, mesh) for kind, mesh in written if mesh.world_size == world_size]:
        trainer = meshes.trainer(config_for(kind, mesh))
        take_steps(trainer, BEFORE)
        trainer.checkpointer = Checkpointer(folder / f"{kind}-{mesh}", keep_last=1)
        trainer.save()
        found[kind, mesh] = standing(trainer)
    return found


def load_all(
    rank: int, world_size: int, folder: Path, cases: Tier
) -> dict[tuple[str, Mesh, Mesh], Standing]:
    meshes, found = Meshes(), {}
    chosen = [case for case in cases if case[2].world_size == world_size]
    for kind, source, mesh in sorted(chosen, key=lambda case: case[2]):
        trainer = meshes.trainer(config_for(kind, mesh))
        with torch.no_grad():
            for chunk in chunks_of(trainer):
                for parameter in chunk.parameters():
                    parameter.add_(1.0)
        trainer.resume(open_checkpoint(folder / f"{kind}-{source}"))
        found[kind, source, mesh] = standing(trainer)
    return found


@pytest.fixture(scope="module")
def stands(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what saves and what loads the cases of a tier; each launch runs once.

    Both return each rank's results.
    """

    @cache
    def folder(tier: Tier) -> Path:
        return tmp_path_factory.mktemp("checkpoints")

    @cache
    def saved(tier: Tier) -> dict[tuple[str, Mesh], Standing]:
        found: dict[tuple[str, Mesh], Standing] = {}
        for size in (1, 4):
            found |= run_ranks(save_all, size, folder(tier), tier, timeout=240)[0]
        return found

    @cache
    def loaded(tier: Tier, world_size: int) -> list[dict[tuple[str, Mesh, Mesh], Standing]]:
        return run_ranks(load_all, world_size, folder(tier), tier, timeout=240)

    return saved, loaded


@pytest.mark.parametrize(("tier", "kind", "source", "mesh"), TIERS, ids=name)
def test_loads_whole_on_another_mesh(
    stands: Any, tier: Tier, kind: str, source: Mesh, mesh: Mesh
) -> None:
    saved, loaded = stands
    expected = saved(tier)[kind, source]
    of_ranks = [found[kind, source, mesh] for found in loaded(tier, mesh.world_size)]
    assert of_ranks[0].weights == expected.weights
    assert of_ranks[0].moments == expected.moments
    assert {found.updates for found in of_ranks} == {BEFORE}
    for found in of_ranks:
        assert (found.step, found.sample) == (expected.step, expected.sample) == (BEFORE, 36)
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        if mesh == source:
            assert found.losses == expected.losses

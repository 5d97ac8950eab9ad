"""A run on a mixture, packed and balanced: the same on every mesh, and after a stop."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lcdist.commands.train import run
from lcdist.config.schema import Config
from lcdist.data.meta import Meta, write_meta
from lcdist.data.prepare.indexed import IndexedWriter
from lcdist.evaluate.evaluation import evaluate_checkpoint
from lcdist.rundir.records import read_records
from tests.distributed import run_ranks
from tests.train.test_resume import config_in, launched, signalled_at

VOCAB = 250


def token_folder(folder: Path, lengths: list[int], seed: int) -> None:
    """Documents of such lengths, of random tokens; one of them is held out as well."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for split, held in (("train", lengths), ("valid", [150])):
        with IndexedWriter(folder / split, VOCAB) as writer:
            for length in held:
                writer.add(torch.randint(1, VOCAB, (length,), generator=generator).tolist())
    tokens, documents = {"train": sum(lengths), "valid": 150}, {"train": len(lengths), "valid": 1}
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    write_meta(folder, Meta(1, "", VOCAB, 0, "", documents, tokens, {}, {}, 0, [], files))


def mixed(folder: Path, name: str, *words: str) -> Config:
    sources = [f"data.mixture.{name}.path={folder / name}" for name in ("short", "long")]
    how = ["data.source=tokens", "data.documents=pack", "data.packing=best_fit"]
    how += ["data.balance=true", "data.mixture.long.weight=3", "data.long_from=[60]"]
    how += ["data.long_factor=[2]", "train.seqlen=96", "train.global_batch_size=4"]
    return config_in(folder / name, *sources, *how, "train.micro_batch_size=1", *words)


def train(rank: int, world_size: int, folder: Path) -> list[Any]:
    launched(world_size)
    for name, mesh in (
        ("dp", ()),
        ("cp", ("cp_size",)),
        ("tp", ("tp_size",)),
        ("pp", ("pp_size",)),
    ):
        run(mixed(folder, name, *(f"parallel.{axis}={world_size}" for axis in mesh)))
    signalled_at(mixed(folder, "stopped"), 3, signal.SIGTERM, 0)
    words = ["evaluate.lengths=[32,96]", "evaluate.tokens=96"]
    return evaluate_checkpoint(folder / "dp", words)["perplexity"]


def alone(rank: int, world_size: int, folder: Path) -> None:
    launched(world_size)
    run(mixed(folder, "one"))
    # What two ranks began is gone on with by one.
    run(mixed(folder, "stopped"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("mixed")
    token_folder(folder / "short", [5, 9, 31, 17, 64, 2, 40, 40, 12, 77], 0)
    token_folder(folder / "long", [200, 96, 61, 3, 150, 90], 1)
    scores = run_ranks(train, 2, folder)
    run_ranks(alone, 1, folder)
    return folder, scores[0]


@pytest.mark.parametrize("name", ["dp", "cp", "tp", "pp", "stopped"])
def test_every_mesh_takes_the_same_steps(trained: Any, name: str) -> None:
    folder, _ = trained
    found, expected = (read_records(folder / run / "metrics.jsonl") for run in (name, "one"))
    assert [r.step for r in found] == [1, 2, 3, 4, 5, 6] == [r.step for r in expected]
    assert [(r.samples, r.tokens) for r in found] == [(r.samples, r.tokens) for r in expected]
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-5)
    # Rows hold documents whole, so some of each is padding.
    assert all(0 < r.tokens < 4 * 96 for r in found)


def test_the_first_folder_of_a_mixture_is_evaluated_on(trained: Any) -> None:
    assert len(trained[1]) == 2 and all(1 < score < 1000 for score in trained[1])

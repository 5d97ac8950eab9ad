"""Runs on conversations: the loss of answers is the same on every mesh, and never undefined."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from lcdist.commands.train import run
from lcdist.config.schema import Config
from lcdist.data.loader import Batch
from lcdist.rundir.records import read_records
from lcdist.train.trainer import Trainer
from tests.data.conversations import MARKED, answered, chat_folder, conversations, tokenized
from tests.data.test_conversations import lines
from tests.distributed import run_ranks
from tests.model.small import Meshes, small
from tests.train.test_resume import config_in, killed_after, launched, unmeasured

# A question that fills windows of 64 tokens, which then have no target.
LONG = [
    {"role": "user", "content": "LONG " * 40},
    {"role": "assistant", "content": "face"},
]
MARK = 259
LANDMARK = ("attention.method=landmark", "attention.block_size=8")
PACK, BEST_FIT = "data.documents=pack", "data.packing=best_fit"
DATA = {
    "joined": (),
    "packed": (PACK,),
    "best fit": (PACK, BEST_FIT),
    "landmarks": LANDMARK,
    "packed landmarks": (*LANDMARK, PACK, BEST_FIT),
}
MESHES = [
    ("parallel.cp_size=2",),
    ("parallel.cp_size=2", "parallel.layout=contiguous", "train.micro_batch_size=2"),
    (),
]
MORE_MESHES = [
    ("parallel.tp_size=2", "train.loss=chunked", "train.loss_chunk=24"),
    ("parallel.pp_size=2",),
    ("train.engine=deepspeed", "deepspeed.stage=2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("conversations")
    talks = [*conversations(12), *([LONG] * 3)]
    source = lines(place / "text", [{"messages": talk} for talk in talks])
    return tokenized(source, place / "tokens", chat_folder(place / "model", MARKED))


def on(folder: Path, *words: str) -> Config:
    vocabulary = MARK + (LANDMARK[0] in words)
    return small(
        f"model.vocab_size={vocabulary}",
        "model.num_layers=2",
        "data.source=tokens",
        f"data.path={folder}",
        *words,
    )


def by_hand(batch: Batch) -> Batch:
    """Return a batch of all targets in which answers alone count, found by their letters."""
    mask = batch.loss_mask.clone()
    for row, tokens in enumerate(batch.tokens):
        at = (tokens != MARK).nonzero().flatten()
        pairs = torch.stack([tokens[at], batch.labels[row, at]], 1)
        wanted = torch.stack([answered(pair)[1] for pair in pairs])
        mask[row, at] *= wanted
    return dataclasses.replace(batch, loss_mask=mask)


# Loss, gradient norm, targets, and the fewest of these in one of this rank's windows.
Step = tuple[float, float, int, int]


def steps_of(trainer: Trainer, count: int, masked: bool) -> list[Step]:
    """Return what some steps computed; masked: by hand."""
    found = []
    for _ in range(count):
        batches = trainer.loader.next_step()
        batches = [by_hand(batch) for batch in batches] if masked else batches
        loss = trainer.engine.forward_backward(batches)
        norm = trainer.engine.step(1e-3)
        fewest = min(int(row.sum()) for batch in batches for row in batch.loss_mask)
        found.append((loss.mean, norm, loss.tokens, fewest))
        trainer.step += 1
    return found


def trained(rank: int, world_size: int, configs: list[Config], masked: bool) -> list[list[Step]]:
    meshes = Meshes()
    return [steps_of(meshes.trainer(config), 3, masked) for config in configs]


def of_reference(folder: Path, data: str) -> list[Step]:
    config = on(folder, "data.targets=all", *DATA[data])
    return run_ranks(trained, 1, [config], True)[0][0]


def check(folder: Path, data: str, meshes: list[tuple[str, ...]]) -> None:
    truth = of_reference(folder, data)
    assert all(0 < targets < 4 * 64 * 3 // 4 for _, _, targets, _ in truth)
    assert data != "joined" or not min(fewest for *_, fewest in truth)
    configs = [on(folder, *DATA[data], *mesh) for mesh in meshes]
    found = run_ranks(trained, 2, configs, False)[0]
    for steps in found:
        for got, wanted in zip(steps, truth, strict=True):
            assert got[2] == wanted[2]
            assert got[0] == pytest.approx(wanted[0], rel=2e-5)
            assert got[1] == pytest.approx(wanted[1], rel=2e-4)


@pytest.mark.parametrize("data", ["joined", "packed landmarks"])
def test_the_loss_is_that_of_one_process_with_a_mask_by_hand(folder: Path, data: str) -> None:
    check(folder, data, MESHES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("data", list(DATA))
def test_the_loss_is_the_same_on_every_mesh(folder: Path, data: str) -> None:
    check(folder, data, MESHES + [mesh for mesh in MORE_MESHES if data == "joined"])


def whole_runs(rank: int, world_size: int, place: Path, tokens: Path) -> None:
    """Train with windows so short that some steps have no target; one run is killed and resumes."""
    launched(world_size)
    words = [
        *(f"model.vocab_size={MARK}", "data.source=tokens", f"data.path={tokens}"),
        *("train.seqlen=8", "train.global_batch_size=2", "train.seed=5"),
    ]
    run(config_in(place / "whole", *words))
    killed_after(config_in(place / "resumed", *words), 4, saved=True)
    run(config_in(place / "resumed", *words))


def test_a_step_without_a_target_changes_nothing_and_the_run_goes_on(
    folder: Path, tmp_path: Path
) -> None:
    run_ranks(whole_runs, 2, tmp_path, folder)
    records = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert {record.skipped for record in records} == {True, False}
    assert all(math.isfinite(record.loss) for record in records)
    assert unmeasured(tmp_path / "resumed") == unmeasured(tmp_path / "whole")

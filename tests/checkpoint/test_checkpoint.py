"""A checkpoint that cannot be used is refused by name, before anything in it is run."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from lcdist.checkpoint import read as room
from lcdist.checkpoint.read import (
    CheckpointError,
    open_checkpoint,
    saved_config,
)
from lcdist.checkpoint.save import Checkpointer
from lcdist.rundir.paths import latest_in
from lcdist.train.resume import open_fitting
from lcdist.train.trainer import Trainer
from tests.checkpoint.stored import stored_tensors
from tests.distributed import run_ranks
from tests.engines.internals import optimizer_of
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import gather_weights


def test_without_a_pointer_the_newest_whole_one_counts(tmp_path: Path) -> None:
    assert latest_in(tmp_path / "nothing") is None
    for name in ("step_00000009", "step_00000010", ".writing-step_00000011"):
        (tmp_path / name).mkdir()
    assert latest_in(tmp_path) == tmp_path / "step_00000010"
    (tmp_path / "latest").write_text("step_00000009\n")
    assert latest_in(tmp_path) == tmp_path / "step_00000009"
    (tmp_path / "latest").write_text("step_00000007\n")
    with pytest.raises(CheckpointError, match="latest names step_00000007, which does not exist"):
        latest_in(tmp_path)


def save_one(rank: int, world_size: int, folder: Path) -> None:
    trainer = Meshes().trainer(small("model.num_layers=1", "train.dtype=fp32"))
    take_steps(trainer, 1)
    trainer.checkpointer = Checkpointer(folder / "run" / "checkpoints", keep_last=1)
    trainer.save()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_ranks(save_one, 2, folder)
    return folder / "run" / "checkpoints" / "step_00000001"


@pytest.fixture
def copied(original: Path, tmp_path: Path) -> Path:
    """Copy a checkpoint for a test to damage."""
    copy = tmp_path / original.name
    copy.mkdir()
    for file in original.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_opens_by_its_own_name_its_folder_or_its_run(original: Path) -> None:
    for path in (original, original.parent, original.parents[1]):
        assert open_checkpoint(path).path == original
    found = open_checkpoint(original)
    assert found.step == 1 and found.manifest["loader"] == {"seed": 3, "sample": 4}
    assert saved_config(found) == small("model.num_layers=1", "train.dtype=fp32")
    assert saved_config(found, ["train.steps=5"]).train.steps == 5
    named = set(found.manifest["files"]) | {room.MANIFEST}
    assert named == {file.name for file in original.iterdir()}


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt"])
def test_a_file_cut_short_or_missing_is_named(copied: Path, name: str) -> None:
    file = copied / name
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(CheckpointError, match=f"file {name} has {size - 1} bytes, not {size}"):
        open_checkpoint(copied)
    file.unlink()
    with pytest.raises(
        CheckpointError, match=f"{copied} is damaged: file {name} is missing; restore"
    ):
        open_checkpoint(copied)


def test_what_is_no_checkpoint_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere': does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty': holds no checkpoint"):
        open_checkpoint(tmp_path / "empty")
    manifest = copied / room.MANIFEST
    whole = manifest.read_text()
    manifest.write_text(whole[:-20])
    with pytest.raises(CheckpointError, match=rf"is damaged: {manifest}:\d+: not JSON"):
        open_checkpoint(copied)
    manifest.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="has checkpoint format 2; this version reads 1"):
        open_checkpoint(copied)
    manifest.unlink()
    with pytest.raises(CheckpointError, match=f"it has no {room.MANIFEST}"):
        open_checkpoint(copied)


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


def plant(checkpoint: Path, name: str, content: bytes) -> None:
    """Put a file of another's making into the checkpoint, its manifest made to fit."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / room.MANIFEST).read_text())
    manifest["files"][name] = len(content)
    manifest = {key: value for key, value in manifest.items() if not key.startswith("sha256")}
    (checkpoint / room.MANIFEST).write_text(json.dumps(manifest))


def test_a_foreign_pickle_is_refused_and_not_run(copied: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    plant(copied, ".metadata", pickle.dumps(Evil(victim)))
    with pytest.raises(CheckpointError, match=r"metadata is not opened: it names \w+.mkdir"):
        open_checkpoint(copied)
    assert not victim.exists()


def test_metadata_that_would_unpickle_bytes_is_refused(copied: Path) -> None:
    metadata = Metadata({"anything": BytesStorageMetadata()})
    plant(copied, ".metadata", pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="BytesStorageMetadata, which no checkpoint needs"):
        open_checkpoint(copied)


def test_damaged_metadata_is_refused_or_harmless(copied: Path) -> None:
    """Bytes that change under an unchanged size never show as anything but a CheckpointError."""
    whole, refused = (copied / ".metadata").read_bytes(), 0
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] = chance.randrange(256)
        (copied / ".metadata").write_bytes(damaged)
        try:
            open_checkpoint(copied)
        except CheckpointError as error:
            assert ".metadata is not opened" in str(error)
            refused += 1
    assert refused > 100


def load_poisoned(rank: int, world_size: int, checkpoint: Path) -> None:
    trainer = Meshes().trainer(small("model.num_layers=1"))
    with pytest.raises((CheckpointError, pickle.UnpicklingError)):
        trainer.resume(open_checkpoint(checkpoint))


def test_no_other_file_is_unpickled_freely(copied: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    torch.save(Evil(victim), copied / "common.pt")
    plant(copied, "common.pt", (copied / "common.pt").read_bytes())
    run_ranks(load_poisoned, 1, copied)
    assert not victim.exists()


def test_another_architecture_is_refused_key_by_key(original: Path) -> None:
    open_fitting(original, small("model.num_layers=1", "model.rope.scaling=pi"))
    other = small("model.num_layers=2", "model.tied_embeddings=true", "model.rope.base=5e5")
    with pytest.raises(CheckpointError) as caught:
        open_fitting(original, other)
    message = str(caught.value)
    assert str(original) in message and message.count(" there and ") == 2
    assert "model.num_layers is 1 there and 2 here" in message
    assert "model.tied_embeddings is False there and True here" in message


def test_what_is_left_out_of_a_shape_is_what_it_stands_for(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A model that comes from elsewhere names all its sizes; a configuration may leave two out.
    named = small("model.num_layers=1", "model.nheads_kv=4", "model.head_dim=16")
    monkeypatch.setattr("lcdist.train.resume.saved_config", lambda checkpoint: named)
    open_fitting(original, small("model.num_layers=1", "model.nheads_kv=0"))
    with pytest.raises(CheckpointError) as caught:
        open_fitting(original, small("model.num_layers=1", "model.head_dim=8"))
    message = str(caught.value)
    assert "nheads_kv is 4 there and 2 here; model.head_dim is 16 there and 8 here" in message


def in_bf16(rank: int, world_size: int, checkpoint: Path) -> dict[str, torch.Tensor]:
    meshes = Meshes()
    config = small("model.num_layers=1", "train.dtype=bf16")
    with pytest.raises(CheckpointError, match="trained in fp32, this run in bf16: set train.dtype"):
        meshes.trainer(config).resume(open_checkpoint(checkpoint))
    trainer: Trainer = meshes.trainer(config)
    trainer.start_from(open_checkpoint(checkpoint))
    assert trainer.step == trainer.loader.sample == 0
    for parameter, master in zip(
        optimizer_of(trainer).mine, optimizer_of(trainer).masters, strict=True
    ):
        assert torch.equal(master, parameter.float())
    return gather_weights(trainer.engine)


def test_another_dtype_resumes_nothing_and_starts_from_its_weights(original: Path) -> None:
    stored = stored_tensors(original)
    for name, value in run_ranks(in_bf16, 1, original)[0].items():
        assert torch.equal(value, stored[name].bfloat16()), name

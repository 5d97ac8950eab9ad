"""Functions for run_ranks in the tests of adapters: train, save, load, merge."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.checkpoint.read import CheckpointError, load_weights, open_checkpoint
from lcdist.checkpoint.save import Checkpointer
from lcdist.convert.lora.adapter import read_adapter
from lcdist.convert.lora.merge import merge, unmerge
from lcdist.data.loader import Batch
from lcdist.engines.state import model_state
from lcdist.evaluate.loaded_model import load_model
from lcdist.layout import ContextLayout
from lcdist.model.sequence import SequenceParams
from lcdist.train.resume import open_fitting, restore_weights
from lcdist.train.trainer import Trainer
from tests.checkpoint.stored import stored_tensors
from tests.engines.internals import chunks_of, optimizer_of
from tests.model.lora_cases import some_b
from tests.model.small import Meshes, small, take_steps
from tests.model.whole import gather_gradients, gather_weights

TEXT = torch.arange(60).mul(37).remainder(250)


def trained(rank: int, world_size: int, folder: Path, words: tuple[str, ...]) -> dict[str, Any]:
    """Return loss and gradients of the first step; then train and save a checkpoint in `folder`."""
    with some_b():
        trainer = Meshes().trainer(small(*words))
    start(trainer)
    engine = trainer.engine
    initial = gather_weights(engine)
    loss = engine.forward_backward(trainer.loader.next_step()).mean
    gradients = gather_gradients(engine)
    norms = [engine.step(1e-2), *(norm for _, norm in take_steps(trainer, 2, 1e-2))]
    trainer.checkpointer = Checkpointer(folder / "checkpoints", keep_last=1)
    trainer.save()
    last = gather_weights(engine)
    return {"loss": loss, "initial": initial, "gradients": gradients, "norms": norms, "last": last}


def start(trainer: Trainer) -> None:
    """Load the weights that a new run starts from."""
    config = trainer.plan.config
    adapter = read_adapter(Path(config.lora.load), config) if config.lora.load else {}
    restore_weights(trainer, None, adapter)


def bare(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words of the same run without adapters."""
    return tuple(word for word in words if not word.startswith("lora."))


def save_base(rank: int, world_size: int, folder: Path, words: tuple[str, ...]) -> None:
    """Save the initial weights of a run; they are the same with and without adapters."""
    trainer = Meshes().trainer(small(*words))
    trainer.checkpointer = Checkpointer(folder / "checkpoints", keep_last=1)
    trainer.save()


def batches(rank: int, world_size: int, words: tuple[str, ...]) -> list[Batch]:
    """Return the unsharded batches of the first step."""
    return Meshes().trainer(small(*words)).loader.next_step()


def started(rank: int, world_size: int, words: tuple[str, ...]) -> tuple[float, dict[str, Tensor]]:
    """(loss of the first step, weights before it) of a run that starts as `words` say."""
    trainer = Meshes().trainer(small(*words))
    start(trainer)
    weights = gather_weights(trainer.engine)
    optimizer = optimizer_of(trainer)
    for parameter, master in zip(optimizer.mine, optimizer.masters, strict=True):
        assert torch.equal(master.to(parameter.dtype), parameter)
    return trainer.engine.forward_backward(trainer.loader.next_step()).mean, weights


def resumed(
    rank: int, world_size: int, folder: Path, words: tuple[str, ...]
) -> tuple[dict[str, Tensor], list[float]]:
    """(weights of the checkpoint in `folder`, losses of two more steps) on this mesh."""
    trainer = Meshes().trainer(small(*words))
    trainer.resume(open_fitting(folder, small(*words)))
    weights = gather_weights(trainer.engine)
    return weights, [loss for loss, _ in take_steps(trainer, 2)]


def logits(rank: int, world_size: int, folders: list[Path], words: list[str]) -> list[Tensor]:
    """By folder, `[60, 250]` after each token of TEXT, as evaluation and generation see them."""
    os.environ["WORLD_SIZE"] = str(world_size)
    found = []
    for folder in folders:
        loaded = load_model(folder, [], words)
        how = SequenceParams(layout=ContextLayout("contiguous", len(TEXT), 1))
        [model] = loaded.chunks
        with torch.no_grad():
            out = model(TEXT[None], None, None, packed_seq_params=how)
        found.append(model.gather_logits(out.float())[0, :, :250])
    return found


def weights_at(folder: Path) -> dict[str, Tensor]:
    """All that the latest checkpoint in `folder` holds."""
    return stored_tensors(open_checkpoint(folder).path)


def merged(rank: int, world_size: int, folder: Path, out: Path) -> list[Tensor]:
    merge(folder, out)
    return logits(rank, world_size, [folder, out], [])


def merged_and_back(rank: int, world_size: int, folder: Path, out: Path) -> None:
    merge(folder, out / "merged")
    unmerge(out / "merged", folder, out / "base")


def read_without(rank: int, world_size: int, folder: Path, words: tuple[str, ...]) -> str:
    chunks = chunks_of(Meshes().trainer(small(*words)))
    with pytest.raises(CheckpointError) as caught:
        load_weights(open_checkpoint(folder), {"chunk0": model_state(chunks)["chunk0"]})
    return str(caught.value)

"""Find the checkpoint that a run continues or starts from, and load it into the trainer."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lcdist.checkpoint.read import (
    LORA_REMEDY,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    saved_config,
)
from lcdist.config.lora import LoraConfig
from lcdist.config.schema import Config, ModelConfig
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.rundir.paths import latest_in
from lcdist.rundir.run_config import check_same_run
from lcdist.train.trainer import Trainer

log = logging.getLogger(__name__)


def find_resume_point(folder: Path, config: Config) -> tuple[Checkpoint | None, list[str]]:
    """Return the run folder's newest checkpoint and the settings changed since the last start.

    The checkpoint is None for a new run; then checkpoint.load is checked instead. Writes nothing.
    Raises ValueError or CheckpointError if the run cannot continue or start as `config` says.
    """
    changes = check_same_run(folder, config)
    newest = latest_in(folder / "checkpoints")
    if newest is not None:
        checkpoint = open_fitting(newest, config)
        if "imported" in checkpoint.manifest:
            raise CheckpointError(
                f"log.folder = '{folder}' holds an imported model, which has no run to go on with: "
                f"start from it with checkpoint.load={folder} and another log.folder"
            )
        return checkpoint, changes
    if config.checkpoint.load:
        base = open_fitting(Path(config.checkpoint.load), config)
        if config.lora.load and saved_config(base).lora.rank:
            raise ValueError(
                f"lora.load = '{config.lora.load}': checkpoint.load has adapters already "
                f"({base.path}); leave one of them out"
            )
    return None, changes


def restore_weights(
    trainer: Trainer,
    checkpoint: Checkpoint | None,
    adapter: Mapping[str, Callable[[], Tensor]],
) -> None:
    """Load weights: resume a checkpoint, start from another run, or keep the initial values.

    Args:
        trainer: of this rank; every rank calls it.
        checkpoint: of the run itself, to resume; None: start from checkpoint.load, if it is set.
        adapter: tensors that replace those of another run's weights, as the engine's
            `load_adapter` takes them; may be empty.
    """
    config = trainer.plan.config
    if checkpoint is not None:
        trainer.resume(checkpoint)
        log.info("resumed %s at step %d", config.log.folder, trainer.step)
    elif config.checkpoint.load:
        source = Path(config.checkpoint.load)
        trainer.start_from(run_on_rank_zero(lambda: open_fitting(source, config)))
        if adapter:
            trainer.engine.load_adapter(adapter)


def open_fitting(path: Path, config: Config) -> Checkpoint:
    """Open the checkpoint at `path` for a run as `config` says.

    Raises CheckpointError if its model has another architecture or other adapters.
    """
    checkpoint = open_checkpoint(path)
    stored = saved_config(checkpoint)
    before, now = _architecture(stored.model), _architecture(config.model)
    differing = [
        f"model.{key} is {before[key]!r} there and {now[key]!r} here"
        for key in now
        if before[key] != now[key]
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} is of another architecture: {'; '.join(differing)}"
        )
    _check_same_adapters(checkpoint, stored.lora, config.lora)
    return checkpoint


def _architecture(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of `[model]` that decide weight shapes, with their defaults filled in."""
    # Rotation, initial values and eps change no shape.
    free = {"rope", "init_std", "norm_eps"}
    shape = {
        key: getattr(model, key) for key in ModelConfig.__dataclass_fields__ if key not in free
    }
    shape["nheads_kv"] = model.nheads_kv or model.nheads
    shape["head_dim"] = model.head_dim or model.hidden_size // model.nheads
    return shape


def _check_same_adapters(checkpoint: Checkpoint, stored: LoraConfig, wanted: LoraConfig) -> None:
    """Raise CheckpointError if the checkpoint has adapters other than `wanted`."""
    if not stored.rank:
        return
    keys = {"rank": (stored.rank, wanted.rank), "alpha": (stored.alpha, wanted.alpha)}
    keys["targets"] = (", ".join(sorted(stored.targets)), ", ".join(sorted(wanted.targets)))
    differing = [f"lora.{k} is {a} there and {b} here" for k, (a, b) in keys.items() if a != b]
    if differing:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} has other LoRA adapters: {'; '.join(differing)}; "
            f"{LORA_REMEDY}"
        )

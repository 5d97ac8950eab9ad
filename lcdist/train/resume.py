"""Find the checkpoint that a run continues or starts from, and load it into the trainer."""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lcdist.checkpoint.manifest import write_latest
from lcdist.checkpoint.read import (
    LORA_REMEDY,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    saved_config,
)
from lcdist.checkpoint.save import sweep_leftovers
from lcdist.checkpoint.verify import verify_checkpoint
from lcdist.config.lora import LoraConfig
from lcdist.config.schema import Config, ModelConfig
from lcdist.distributed.rank_zero import run_on_rank_zero
from lcdist.rundir.paths import (
    CHECKPOINTS,
    CONFIG_FILE,
    DAMAGED_PREFIX,
    LEFT_PREFIX,
    STEP_PREFIX,
    DamagedCheckpointError,
    checkpoint_name,
    latest_in,
    step_of,
)
from lcdist.rundir.run_config import check_same_run, read_config
from lcdist.train.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """Describe the checkpoint that a start of a run begins from.

    Attributes:
        checkpoint: the run's own checkpoint, compared with its digests; None for a new run.
        changes: settings changed since the last start, one line each.
        damaged: newer checkpoints that differ from what was written, and what is wrong.
        newer: other newer checkpoints, because of `checkpoint.resume_from`.
    """

    checkpoint: Checkpoint | None
    changes: list[str]
    damaged: dict[Path, str]
    newer: list[Path]


def choose_start(config: Config, check_new_run: Callable[[], None]) -> ResumePoint:
    """Return the newest checkpoint of a run that is whole; all ranks call it. Writes nothing.

    Args:
        config: of the run; `checkpoint.verify` and `checkpoint.fallback` hold.
        check_new_run: called on rank 0 if the run has no checkpoint; raises ValueError.

    Raises:
        DamagedCheckpointError: the newest checkpoint is damaged and the run may not fall back,
            or there is no other.
        ValueError, CheckpointError: as `find_resume_point`.
    """
    damaged: dict[Path, str] = {}
    own = Path(config.log.folder) / CHECKPOINTS

    def find() -> tuple[Checkpoint | None, list[str]]:
        found = find_resume_point(own.parent, config, damaged)
        if found[0] is None:
            check_new_run()
        return found

    while True:
        try:
            checkpoint, changes = run_on_rank_zero(find)
            if checkpoint is not None:
                verify_checkpoint(checkpoint, config.checkpoint.verify)
            newer = _newer(own, checkpoint, damaged)
            return ResumePoint(checkpoint, changes, damaged, newer)
        except DamagedCheckpointError as error:
            if error.folder.parent != own or not config.checkpoint.fallback:
                raise
            damaged[error.folder] = error.damage


def begin_at(folder: Path, point: ResumePoint) -> None:
    """Log changed settings, delete leftovers, rename the checkpoints that were passed over.

    Rank 0 only. The run will write checkpoints of the same steps as those, which are kept.
    """
    for change in point.changes:
        log.warning("resuming with a changed setting: %s", change)
    sweep_leftovers(folder / CHECKPOINTS)
    passed_over = [*point.damaged, *point.newer]
    if point.checkpoint is None or not passed_over:
        return
    for path, damage in point.damaged.items():
        kept = _rename(path, DAMAGED_PREFIX)
        log.error("DAMAGED CHECKPOINT: %s: %s. It is kept as %s", path, damage, kept.name)
    for path in point.newer:
        log.warning("going back: %s is kept as %s", path, _rename(path, LEFT_PREFIX).name)
    write_latest(point.checkpoint.path)
    newest, step = max(step_of(path) for path in passed_over), point.checkpoint.step
    why = "checkpoint.fallback=false refuses to" if point.damaged else "checkpoint.resume_from"
    log.warning(
        "the run goes on from step %d instead of %d: %d steps are done again (%s)",
        *(step, newest, newest - step, why),
    )


def _rename(folder: Path, prefix: str) -> Path:
    """Put a prefix before the name of a folder, and a number behind it if the name is taken."""
    kept, number = folder.with_name(f"{prefix}{folder.name}"), 1
    while kept.exists():
        number += 1
        kept = folder.with_name(f"{prefix}{folder.name}-{number}")
    return folder.rename(kept)


def _newer(folder: Path, checkpoint: Checkpoint | None, damaged: Collection[Path]) -> list[Path]:
    """Return the run's checkpoints after `checkpoint` that are not damaged."""
    if checkpoint is None:
        return []
    others = set(folder.glob(f"{STEP_PREFIX}*")) - set(damaged)
    return sorted(path for path in others if step_of(path) > checkpoint.step)


def find_resume_point(
    folder: Path, config: Config, damaged: Collection[Path] = ()
) -> tuple[Checkpoint | None, list[str]]:
    """Return the run folder's newest checkpoint and the settings changed since the last start.

    The checkpoint is None for a new run; then checkpoint.load is checked instead. Writes nothing.

    Args:
        folder: of the run.
        config: of the run.
        damaged: checkpoints to pass over.

    Raises:
        ValueError, CheckpointError: the run cannot continue or start as `config` says.
        DamagedCheckpointError: the newest is damaged, or all are in `damaged`.
    """
    changes = check_same_run(folder, config)
    newest = _chosen(folder, config.checkpoint.resume_from) if not damaged else None
    newest = newest or _newest_but(folder / CHECKPOINTS, damaged)
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


def _chosen(folder: Path, step: int) -> Path | None:
    """Return the checkpoint of checkpoint.resume_from; None for the newest.

    Raises CheckpointError if the run has none of that step.
    """
    if not step:
        return None
    begun = (folder / CONFIG_FILE).exists()
    if begun and read_config(folder).checkpoint.resume_from == step:
        log.info("checkpoint.resume_from=%d was done by an earlier start", step)
        return None
    chosen = folder / CHECKPOINTS / checkpoint_name(step)
    if chosen.is_dir():
        return chosen
    steps = sorted(step_of(path) for path in chosen.parent.glob(f"{STEP_PREFIX}*"))
    listed = f"one of {', '.join(map(str, steps))}" if steps else "another run: it has none at all"
    raise CheckpointError(
        f"checkpoint.resume_from = {step}: {chosen.parent} has no checkpoint of that step; choose "
        f"{listed}"
    )


def _newest_but(folder: Path, damaged: Collection[Path]) -> Path | None:
    """Return the newest checkpoint in `folder` that is not in `damaged`; None without any."""
    if not damaged:
        return latest_in(folder)
    whole = sorted(set(folder.glob(f"{STEP_PREFIX}*")) - set(damaged))
    if whole:
        return whole[-1]
    why = damaged if isinstance(damaged, Mapping) else {}
    names = "; ".join(f"{path.name}: {why.get(path, 'damaged')}" for path in sorted(damaged))
    raise CheckpointError(
        f"{folder} has no checkpoint that is not damaged ({names}): restore one of them, or begin "
        "again in another log.folder"
    )


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
        base = run_on_rank_zero(lambda: open_fitting(source, config))
        verify_checkpoint(base, config.checkpoint.verify)
        trainer.start_from(base)
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

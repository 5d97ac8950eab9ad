"""Merge LoRA adapters into the base weights, W + alpha/r B A, and remove them again.

Both directions write a folder like a run's with one checkpoint without adapters. Products and sums
are computed in fp32, some rows at a time, and rounded once to the dtype of the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.manifest import Checkpoint, CheckpointError, write_latest, write_manifest
from lcdist.checkpoint.read import open_checkpoint, saved_config
from lcdist.checkpoint.tensors import CheckpointTensors, TensorSource, write_tensors
from lcdist.config import dump
from lcdist.config.lora import LoraConfig, Target
from lcdist.config.schema import Config
from lcdist.convert.huggingface.names import FusedTensor, fused_tensors
from lcdist.convert.lora.adapter import open_lora_checkpoint
from lcdist.convert.lora.names import MODULES
from lcdist.convert.streamed_forward import check_single_process
from lcdist.distributed.mesh import start_world
from lcdist.model.init import LORA_PARAMS
from lcdist.rundir.paths import CHECKPOINTS, checkpoint_name
from lcdist.utils.atomic import atomic_folder, check_free
from lcdist.utils.progress import Progress, silent

_TARGETS: Mapping[str, Target] = {theirs: target for target, (_, theirs) in MODULES.items()}


def merge(path: Path | str, out: Path | str, progress: Progress = silent) -> None:
    """Write the checkpoint at `path` with its adapters merged into the new folder `out`.

    Raises:
        CheckpointError: the checkpoint has no adapters.
        ValueError: `out` exists, or there is more than one process.
    """
    check_single_process()
    checkpoint, config = open_lora_checkpoint(Path(path))
    tensors = CheckpointTensors(checkpoint)
    sources = _summed_tensors(tensors, tensors, config, 1)
    _write_checkpoint(Path(out), checkpoint, config, sources, progress)


def unmerge(
    merged: Path | str, adapted: Path | str, out: Path | str, progress: Progress = silent
) -> None:
    """Write the checkpoint at `merged` without the adapters of `adapted` into the new folder `out`.

    The result is the base weights up to rounding. Merging rounded each weight once: the error is up
    to 2^-24 of the merged weight in fp32 and 2^-8 in bf16, plus as much of the base weight. The
    frozen weights in `adapted` are the exact base.

    Args:
        merged: checkpoint with merged weights, or a run that started from one.
        adapted: checkpoint with the adapters that were merged.
        out: folder to create.
        progress: called with the bytes that are written.

    Raises:
        CheckpointError: `adapted` also trained modules whole, which merging replaced, or is of
            another model.
        ValueError: as `merge`.
    """
    check_single_process()
    checkpoint, config = open_lora_checkpoint(Path(adapted))
    modules = [key for key in ("embeddings", "norms", "head") if getattr(config.lora, key)]
    if modules:
        raise CheckpointError(
            f"{checkpoint.path} trained {', '.join(modules)} whole (lora.{modules[0]} = true): no "
            "merged checkpoint holds their earlier values; start from the base model itself"
        )
    merged_checkpoint = open_checkpoint(Path(merged))
    merged_config = saved_config(merged_checkpoint)
    if merged_config.lora.rank or merged_config.model != config.model:
        raise CheckpointError(
            f"{merged_checkpoint.path} is not a merged checkpoint of {checkpoint.path}: "
            + ("it has adapters" if merged_config.lora.rank else "it is of another model")
        )
    base, adapters = CheckpointTensors(merged_checkpoint), CheckpointTensors(checkpoint)
    sources = _summed_tensors(base, adapters, config, -1)
    _write_checkpoint(Path(out), merged_checkpoint, merged_config, sources, progress)


def _summed_tensors(
    base: CheckpointTensors, adapters: CheckpointTensors, config: Config, sign: int
) -> list[TensorSource]:
    """Return every weight of `base` plus `sign` times the scaled products of `adapters`."""
    fused = {ours.key: ours for ours in fused_tensors(config.model)}
    scale = sign * config.lora.scale
    return [
        TensorSource(
            key, base.shape(key), base.dtype(key), _row_reader(base, key, adapters, scale, fused)
        )
        for key in base.names
        if LORA_PARAMS not in key
    ]


def _row_reader(
    base: CheckpointTensors,
    key: str,
    adapters: CheckpointTensors,
    scale: float,
    fused: Mapping[str, FusedTensor],
) -> Callable[[int, int], Tensor]:
    """Return a function that computes rows first to stop of the weight `key`."""
    prefix = key.removesuffix("weight") + LORA_PARAMS.lstrip(".")
    names = [name for name in adapters.names if name.startswith(prefix)]

    def rows(first: int, stop: int) -> Tensor:
        weight = base.rows(key, first, stop)
        if not names:
            return weight
        factors = {name.removeprefix(prefix): adapters.rows(name).float() for name in names}
        total, row = weight.float(), 0
        for part in fused[key].parts_between(first, stop):
            target, end = _target(part.name), row + part.count
            if f"{target}.B" in factors:
                B = factors[f"{target}.B"][part.first : part.first + part.count]
                total[row:end].addmm_(B, factors[f"{target}.A"], alpha=scale)
            row = end
        assert row == len(total), key
        return total.to(weight.dtype)

    return rows


def _target(name: str) -> Target:
    """Return the target whose projection is the Hugging Face tensor `name`."""
    module = ".".join(name.split(".")[-3:-1])
    return _TARGETS[module]


def _write_checkpoint(
    out: Path,
    source: Checkpoint,
    config: Config,
    tensors: list[TensorSource],
    progress: Progress,
) -> None:
    """Write a folder like a run's with one checkpoint of the source's step, without [lora]."""
    start_world(config.parallel.timeout)
    check_free(out, sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in tensors))
    content = {
        "config": dump(replace(config, lora=LoraConfig())),
        "plan": {},
        **{key: source.manifest[key] for key in ("dtype", "world_size", "versions")},
        "loader": {},
        "random_states": [],
    }
    with atomic_folder(out) as partial:
        folder = partial / CHECKPOINTS / checkpoint_name(source.step)
        folder.mkdir(parents=True)
        write_tensors(folder, tensors, progress)
        write_manifest(folder, source.step, content)
        write_latest(folder)

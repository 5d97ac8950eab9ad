"""Adapters into the weights they were trained on, W + alpha/r B A, and out of them again.

Both write a folder like a run's with one checkpoint that has no adapters. Products and sums are
made in fp32 and rounded once to the dtype of the weights, a few rows at a time.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.read import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    saved_config,
)
from lcdist.checkpoint.tensors import Stored, Tensors, write_tensors
from lcdist.config import dump
from lcdist.config.lora import LoraConfig, Target
from lcdist.config.schema import Config
from lcdist.convert.huggingface.names import FusedTensor, correspondence
from lcdist.convert.lora.adapter import MODULES, open_adapted
from lcdist.convert.streamed_forward import check_alone
from lcdist.distributed.mesh import start_world
from lcdist.model.init import LORA
from lcdist.rundir.paths import LATEST, checkpoint_name
from lcdist.utils.atomic import atomic_folder, check_free, write_file

_TARGETS: Mapping[str, Target] = {theirs: target for target, (_, theirs) in MODULES.items()}


def merge(path: Path, out: Path) -> None:
    """Write the checkpoint at `path` into the new folder `out` with its adapters merged.

    Raises CheckpointError where it has none, ValueError where `out` exists or where there is more
    than one process.
    """
    check_alone()
    checkpoint, config = open_adapted(path)
    stored = Stored(checkpoint)
    _write(out, checkpoint, config, _changed(stored, stored, config, 1))


def unmerge(merged: Path, adapted: Path, out: Path) -> None:
    """Write the checkpoint at `merged` into `out` without what `adapted` had merged into it.

    The base weights to rounding: what a weight lost when it was rounded after merging does not come
    back, so each is off by up to 2^-24 of the merged weight's size in fp32, 2^-8 of it in bf16, and
    as much of its own; the frozen weights in `adapted` are the base itself. Raises CheckpointError
    where `adapted` trained more than adapters, which merging has replaced, or is of another model.
    """
    check_alone()
    checkpoint, config = open_adapted(adapted)
    whole = [key for key in ("embeddings", "norms", "head") if getattr(config.lora, key)]
    if whole:
        raise CheckpointError(
            f"{checkpoint.path} trained {', '.join(whole)} whole (lora.{whole[0]} = true): what "
            "they were before is in no merged checkpoint; start from the base model itself"
        )
    from_merged = open_checkpoint(merged)
    there = saved_config(from_merged)
    if there.lora.rank or there.model != config.model:
        raise CheckpointError(
            f"{from_merged.path} is no merged checkpoint of {checkpoint.path}: "
            + ("it has adapters" if there.lora.rank else "it is of another model")
        )
    _write(out, from_merged, there, _changed(Stored(from_merged), Stored(checkpoint), config, -1))


def _changed(base: Stored, adapters: Stored, config: Config, sign: int) -> list[Tensors]:
    """Every weight of `base`, with the products of `adapters` added `sign` times."""
    table = {ours.key: ours for ours in correspondence(config.model)}
    scale = sign * config.lora.scale
    return [
        Tensors(key, base.shape(key), base.dtype(key), _rows(base, key, adapters, scale, table))
        for key in base.names
        if LORA not in key
    ]


def _rows(
    base: Stored, key: str, adapters: Stored, scale: float, table: Mapping[str, FusedTensor]
) -> Callable[[int, int], Tensor]:
    prefix = key.removesuffix("weight") + LORA.lstrip(".")
    names = [name for name in adapters.names if name.startswith(prefix)]

    def rows(first: int, stop: int) -> Tensor:
        weight = base.rows(key, first, stop)
        if not names:
            return weight
        factors = {name.removeprefix(prefix): adapters.rows(name).float() for name in names}
        total, row = weight.float(), 0
        for part in table[key].slices(first, stop):
            target, end = _target(part.name), row + part.count
            if f"{target}.B" in factors:
                B = factors[f"{target}.B"][part.first : part.first + part.count]
                total[row:end].addmm_(B, factors[f"{target}.A"], alpha=scale)
            row = end
        assert row == len(total), key
        return total.to(weight.dtype)

    return rows


def _target(name: str) -> Target:
    """The target whose projection is the Hugging Face tensor `name`."""
    module = ".".join(name.split(".")[-3:-1])
    return _TARGETS[module]


def _write(out: Path, source: Checkpoint, config: Config, tensors: list[Tensors]) -> None:
    """A folder like a run's with one checkpoint, of `source`'s step and without [lora]."""
    bare = replace(config, lora=LoraConfig())
    start_world(config.parallel.timeout)
    check_free(out, sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in tensors))
    kept = ("dtype", "world_size", "versions")
    with atomic_folder(out) as half:
        folder = half / "checkpoints" / checkpoint_name(source.step)
        folder.mkdir(parents=True)
        write_tensors(folder, tensors)
        content = {
            "format": FORMAT,
            "step": source.step,
            "config": dump(bare),
            "plan": {},
            **{key: source.manifest[key] for key in kept},
            "loader": {},
            "random_states": [],
            "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()},
        }
        write_file(folder / MANIFEST, json.dumps(content, indent=1))
        write_file(folder.parent / LATEST, folder.name + "\n")

"""Sharded checkpoints as they are found and read: Megatron's torch_dist format, and a manifest.

A checkpoint is a folder `step_00000020` with Megatron's files and a manifest, `lcdist.json`, that
holds everything that is not a tensor: step, sample index, mesh, configuration, and the size of
every file. A name that begins with `step_` always means a whole checkpoint (`saving` sees to it).
`latest` names the newest.
"""

import json
import logging
import pickle
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config import parse
from lcdist.config.schema import Config
from lcdist.model.init import EXTRAS, LORA
from lcdist.rundir.paths import (
    CHECKPOINTS,
    RESTORE_OR_DELETE,
    STEP_PREFIX,
    CheckpointError,
    latest_in,
)
from megatron.core import dist_checkpointing

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "lcdist.json"
HALF = ".writing-"

# All that torch's own writer puts into `.metadata` when every entry is a tensor, as here: an entry
# of bytes would be unpickled. A file that asks for anything else is not opened.
_PICKLED = {
    "torch": {"Size", "bfloat16", "float32", "uint8"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "MetadataIndex",
        "Metadata",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}

# What unpickling raises on damaged bytes: whatever the opcodes they happen to spell run into.
_DAMAGED = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError),
    *(ArithmeticError, MemoryError, RuntimeError),
)


MERGE = "set [lora] as it was there, or merge them into the weights first: 'lcdist convert merge'"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk. manifest: the content of its `lcdist.json`."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps taken when it was written."""
        return self.manifest["step"]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, or the latest one where `path` is a folder of them or a run.

    Raises CheckpointError where there is none, where a file is missing or has another size than
    when it was written, or where the metadata would run foreign code.
    """
    folder = _resolve(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no {MANIFEST}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {manifest.get('format')!r}; this version reads "
            f"{FORMAT}"
        )
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder}: file {name} is missing; {RESTORE_OR_DELETE}")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{folder}: file {name} has {file.stat().st_size} bytes, not {size}; "
                f"{RESTORE_OR_DELETE}"
            )
    refuse_foreign_pickle(folder / ".metadata")
    return Checkpoint(folder, manifest)


def saved_config(checkpoint: Checkpoint, overrides: Sequence[str] = ()) -> Config:
    """The configuration a checkpoint was written under, with `section.key=value` overrides."""
    return parse(tomllib.loads(checkpoint.manifest["config"]), overrides)


def _resolve(path: Path) -> Path:
    for folder in (path, path / CHECKPOINTS):
        if (folder / MANIFEST).exists() or folder.name.startswith(STEP_PREFIX):
            return folder
        newest = latest_in(folder)
        if newest is not None:
            return newest
    what = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"checkpoint '{path}': {what}; give the folder of a checkpoint, or of a run that saved one"
    )


def load_state(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors of `checkpoint` in the shape and sharding that `state` asks for."""
    loaded: Any = dist_checkpointing.load(state, str(checkpoint.path))
    return loaded


def load_weights(checkpoint: Checkpoint, model: dict[str, Any]) -> dict[str, Any]:
    """The weights of `checkpoint` for the chunks' sharded state `model`; all ranks call it.

    What an attention method learns beside its projections may be on one side alone: absent, it
    keeps its present value; not asked for, it is left out. Either is logged. Adapters keep their
    initial values where the checkpoint has none; raises CheckpointError where it has others.
    """
    shapes: Any = dist_checkpointing.load_tensors_metadata(str(checkpoint.path))
    saved = {key: tuple(tensor.global_shape) for key, tensor in shapes.items()}
    optional = {
        e.key: tuple(e.global_shape)
        for chunk in model.values()
        for e in chunk.values()
        if EXTRAS in e.key or LORA in e.key
    }
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, optional)
    asked = {key: shape for mine in everywhere for key, shape in mine.items()}
    _check_adapters(checkpoint, saved, asked)
    here = {
        name: {k: entry for k, entry in chunk.items() if entry.key not in asked.keys() - saved}
        for name, chunk in model.items()
    }
    loaded = load_state(checkpoint, here)
    for name, chunk in model.items():
        kept = {key: entry.data for key, entry in chunk.items() if key not in here[name]}
        loaded[name].update(kept)
    unread = {key for key in saved if EXTRAS in key and not key.startswith("optimizer.")}
    if dist.get_rank() == 0:
        for key in sorted(key for key in asked.keys() - saved if EXTRAS in key):
            log.warning("%s has no %s: it keeps its initial value", checkpoint.path, key)
        for key in sorted(unread - asked.keys()):
            log.warning("%s: %s is left out: nothing here learns it", checkpoint.path, key)
    return loaded


def _check_adapters(
    checkpoint: Checkpoint, saved: Mapping[str, tuple], asked: Mapping[str, tuple]
) -> None:
    """Adapters there are those asked for here, or there are none there."""
    there = {k: s for k, s in saved.items() if LORA in k and not k.startswith("optimizer.")}
    here = {k: s for k, s in asked.items() if LORA in k}
    if not there or there == here:
        return
    differing = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
    key = differing[0]
    what = [f"of shape {side[key]}" if key in side else "absent" for side in (there, here)]
    raise CheckpointError(
        f"{checkpoint.path} has LoRA adapters, other than lora asks for: {key} is {what[0]} there "
        f"and {what[1]} here ({len(differing)} differ); {MERGE}"
    )


def refuse_foreign_pickle(file: Path) -> None:
    """Raise CheckpointError unless the pickle `file` holds only what torch's writer puts there."""
    try:
        with file.open("rb") as stream:
            _Guard(stream).load()
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent}: file {file.name} is missing") from None
    except _DAMAGED as error:
        raise CheckpointError(f"{file} is not opened: {error}; {RESTORE_OR_DELETE}") from error


class _Guard(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _PICKLED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")

"""Find, check and load sharded checkpoints."""

import contextlib
import logging
import pickle
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.manifest import Checkpoint, read_manifest
from lcdist.config import parse
from lcdist.config.schema import Config
from lcdist.model.init import LORA_PARAMS, METHOD_PARAMS
from lcdist.rundir.paths import (
    CHECKPOINTS,
    MANIFEST,
    STEP_PREFIX,
    CheckpointError,
    DamagedCheckpointError,
    latest_in,
)
from lcdist.utils.digests import damaged_files
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException

log = logging.getLogger(__name__)

# All classes that torch's writer puts into `.metadata` when every entry is a tensor, as here; an
# entry of bytes would be unpickled. A file that names any other class is not opened.
_ALLOWED_CLASSES = {
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

# Everything that unpickling damaged bytes raises, depending on the opcodes they happen to form.
_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError),
    *(ArithmeticError, MemoryError, RuntimeError),
)

LORA_REMEDY = (
    "set [lora] as in the checkpoint, or merge the adapters into the weights first: "
    "'lcdist convert merge'"
)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the checkpoint at `path`, or the latest one if `path` is a run or checkpoints folder.

    Raises:
        CheckpointError: there is no checkpoint.
        DamagedCheckpointError: a file is missing or has another size than when it was written, or
            the metadata is not legible or would run foreign code.
    """
    folder = _find_folder(path)
    manifest = read_manifest(folder)
    check_metadata(folder / ".metadata")
    return Checkpoint(folder, manifest)


def saved_config(checkpoint: Checkpoint, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a checkpoint, with `section.key=value` overrides."""
    return parse(tomllib.loads(checkpoint.manifest["config"]), overrides)


def _find_folder(path: Path) -> Path:
    for folder in (path, path / CHECKPOINTS):
        if (folder / MANIFEST).exists() or folder.name.startswith(STEP_PREFIX):
            return folder
        newest = latest_in(folder)
        if newest is not None:
            return newest
    problem = "holds no checkpoint" if path.exists() else "does not exist"
    raise CheckpointError(
        f"checkpoint '{path}': {problem}; give the folder of a checkpoint, or of a run that saved "
        "one"
    )


def load_state(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    """Load the tensors of `checkpoint` in the shape and sharding that `state` describes.

    Raises DamagedCheckpointError if a file cannot be loaded, and differs from its digest or has
    none.
    """
    with _damage_told(checkpoint):
        loaded: Any = dist_checkpointing.load(state, str(checkpoint.path))
    return loaded


@contextlib.contextmanager
def _damage_told(checkpoint: Checkpoint) -> Iterator[None]:
    """Within, turn an error that a damaged file causes into DamagedCheckpointError."""
    try:
        yield
    except (CheckpointError, CheckpointingException):
        raise
    except (Exception, CheckpointException) as error:
        # `checkpoint.verify = "size"` does not read the files of tensors beforehand.
        digests = checkpoint.manifest.get("sha256")
        damage = damaged_files(checkpoint.path, digests or {})
        hint = "checkpoint.verify=full notices it in time to go on from an older checkpoint"
        if digests is None:
            causes = [str(each[0]) for each in getattr(error, "failures", {}).values()]
            damage = [f"a file cannot be loaded: {(causes or [str(error)])[0].splitlines()[0]}"]
            hint = "it is older than digests, which would say which"
        if not damage:
            raise
        raise DamagedCheckpointError(checkpoint.path, f"{'; '.join(damage)} ({hint})") from error


def load_weights(checkpoint: Checkpoint, model: dict[str, Any]) -> dict[str, Any]:
    """Load the weights of `checkpoint` into the sharded state `model`; all ranks call it.

    Tensors that attention methods learn besides the projections are optional. One that the
    checkpoint lacks keeps its present value; one that the model lacks is ignored; both are logged.
    Adapters keep their initial values if the checkpoint has none.

    Args:
        checkpoint: opened checkpoint.
        model: sharded state of each of this rank's model chunks, by chunk name.

    Returns:
        The state of each chunk with loaded tensors.

    Raises:
        CheckpointError: the checkpoint has adapters that differ from the model's.
    """
    with _damage_told(checkpoint):
        metadata: Any = dist_checkpointing.load_tensors_metadata(str(checkpoint.path))
    saved = {key: tuple(tensor.global_shape) for key, tensor in metadata.items()}
    optional = {
        entry.key: tuple(entry.global_shape)
        for chunk in model.values()
        for entry in chunk.values()
        if METHOD_PARAMS in entry.key or LORA_PARAMS in entry.key
    }
    per_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(per_rank, optional)
    requested = {key: shape for shapes in per_rank for key, shape in shapes.items()}
    _check_adapters(checkpoint, saved, requested)
    absent = requested.keys() - saved
    to_load = {
        name: {k: entry for k, entry in chunk.items() if entry.key not in absent}
        for name, chunk in model.items()
    }
    loaded = load_state(checkpoint, to_load)
    for name, chunk in model.items():
        kept = {key: entry.data for key, entry in chunk.items() if key not in to_load[name]}
        loaded[name].update(kept)
    stored = {key for key in saved if METHOD_PARAMS in key and not key.startswith("optimizer.")}
    if dist.get_rank() == 0:
        for key in sorted(key for key in absent if METHOD_PARAMS in key):
            log.warning("%s has no %s: it keeps its initial value", checkpoint.path, key)
        for key in sorted(stored - requested.keys()):
            log.warning("%s: %s is ignored: the model does not have it", checkpoint.path, key)
    return loaded


def _check_adapters(
    checkpoint: Checkpoint, saved: Mapping[str, tuple], requested: Mapping[str, tuple]
) -> None:
    """Raise CheckpointError if the checkpoint has adapters that differ from the model's."""
    stored = {k: s for k, s in saved.items() if LORA_PARAMS in k and not k.startswith("optimizer.")}
    wanted = {k: s for k, s in requested.items() if LORA_PARAMS in k}
    if not stored or stored == wanted:
        return
    different = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
    key = different[0]
    shapes = [f"has shape {side[key]}" if key in side else "is absent" for side in (stored, wanted)]
    raise CheckpointError(
        f"{checkpoint.path} has other LoRA adapters than [lora] describes: {key} {shapes[0]} in "
        f"the checkpoint and {shapes[1]} in the model ({len(different)} differ); {LORA_REMEDY}"
    )


def check_metadata(file: Path) -> None:
    """Raise DamagedCheckpointError if the pickle `file` needs a class that torch does not write."""
    try:
        with file.open("rb") as stream:
            _RestrictedUnpickler(stream).load()
    except FileNotFoundError:
        raise DamagedCheckpointError(file.parent, f"file {file.name} is missing") from None
    except _UNPICKLING_ERRORS as error:
        damage = f"file {file.name} is not opened: {error}"
        raise DamagedCheckpointError(file.parent, damage) from error


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

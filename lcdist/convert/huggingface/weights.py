"""Open and check the weights of a Hugging Face folder: one file or indexed shards."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lcdist.convert.huggingface.safetensors import DTYPES, TensorEntry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# These files hold pickled objects, which can run code: they are never opened.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_MAX_NAMES = 8


class StoredTensor(Protocol):
    """A tensor on disk. dtype: safetensors' name of it, such as "BF16"."""

    @property
    def dtype(self) -> str: ...  # noqa: D102

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def rows(self, first: int, stop: int) -> Tensor:
        """Return a copy of rows first to stop, in the stored dtype."""
        ...


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder by name; the header of every file has been checked."""

    folder: Path
    entries: Mapping[str, StoredTensor]

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return rows first to stop of the tensor `name`, in the stored dtype."""
        entry = self.entries[name]
        return entry.rows(first, entry.shape[0] if stop is None else stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the tensor `name`."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor in our checkpoint: its own, or fp32 for fp16.

        fp32 holds every fp16 number; bf16 has three bits of mantissa less.
        """
        dtype = DTYPES[self.entries[name].dtype]
        return torch.float32 if dtype == torch.float16 else dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in our checkpoint."""
        return sum(
            math.prod(entry.shape) * self.dtype(name).itemsize
            for name, entry in self.entries.items()
        )


def open_weights(folder: Path) -> Weights:
    """Open model.safetensors in `folder`, or the shards that its index names.

    Raises:
        ValueError: naming the file or tensor: no weights, a missing or damaged shard, or an index
            that disagrees with the shards.
    """
    if (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            raise ValueError(f"{folder} has both {SINGLE} and {INDEX}: remove the outdated one")
        return Weights(folder, _read_shards(folder))
    if (folder / SINGLE).is_file():
        return Weights(folder, read_header(folder / SINGLE))
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    unindexed = [name for name in present if name.endswith(".safetensors")]
    if unindexed:
        raise ValueError(
            f"{folder} has {_join(unindexed)} and neither {SINGLE} nor {INDEX}: a single file must "
            "have that name, shards need their index"
        )
    pickled = [name for name in present if name.endswith(_PICKLED)]
    if pickled:
        raise ValueError(
            f"{folder} has its weights in {_join(pickled)}, which can run code when opened: "
            "convert to safetensors first (load the model where you trust it and call "
            "save_pretrained)"
        )
    raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    """Read the header of every shard and compare it with the index."""
    file_of = _read_index(folder / INDEX)
    files = sorted(set(file_of.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        others = sorted({path.name for path in folder.glob("*.safetensors")} - set(files))
        hint = f"; it does not name {_join(others)}, which the folder has" if others else ""
        raise ValueError(f"{folder}: {INDEX} names {_join(missing)}, missing in the folder{hint}")
    entries: dict[str, TensorEntry] = {}
    errors = []
    for name in files:
        held = read_header(folder / name)
        indexed = {tensor for tensor, file in file_of.items() if file == name}
        errors += [f"{name} lacks {tensor}" for tensor in indexed - {*held}]
        errors += [f"{name} has {tensor}, which is not indexed" for tensor in {*held} - indexed]
        entries |= held
    if errors:
        raise ValueError(
            f"{folder}: {INDEX} disagrees with the files: {_join(sorted(errors), '; ')}"
        )
    return entries


def _read_index(index: Path) -> dict[str, str]:
    """Return the file name of each tensor."""
    try:
        table = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} is not JSON: {error}") from error
    file_of = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(file_of, dict) or not file_of:
        raise ValueError(f"{index} has no table weight_map")
    for tensor, name in file_of.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith("safetensors"):
            raise ValueError(
                f"{index}: {tensor} in {name!r}: must be a .safetensors file in the same folder"
            )
    return file_of


def _join(names: list[str], separator: str = ", ") -> str:
    """Join at most eight names, and count the others."""
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return separator.join(names[:_MAX_NAMES]) + more

"""The weights of a Hugging Face folder: which file holds which tensor, all checked at the start."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lcdist.convert.huggingface.safetensors import DTYPES, Entry, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Files that hold pickled objects, which are never opened.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_SHOWN = 8


@dataclass(frozen=True)
class Weights:
    """The tensors of a folder by name. Lengths and offsets of every file have been checked."""

    folder: Path
    entries: Mapping[str, Entry]

    def rows(self, name: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows first to stop of the tensor `name`, in its own dtype."""
        entry = self.entries[name]
        return entry.rows(first, entry.shape[0] if stop is None else stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self.entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """What it is stored in on our side: its own dtype, or fp32, which holds every fp16 number.

        bf16 would not: it has three bits of mantissa less.
        """
        dtype = DTYPES[self.entries[name].dtype]
        return torch.float32 if dtype == torch.float16 else dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored on our side."""
        return sum(
            math.prod(entry.shape) * self.dtype(name).itemsize
            for name, entry in self.entries.items()
        )


def open_weights(folder: Path) -> Weights:
    """The tensors of `folder`: of model.safetensors, or of the shards that its index names.

    Raises ValueError naming the file or the tensor: nothing to read, a shard that is missing or
    truncated, an index that does not say what the files hold.
    """
    if (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            raise ValueError(f"{folder} has both {SINGLE} and {INDEX}: remove the one that is old")
        return Weights(folder, _sharded(folder))
    if (folder / SINGLE).is_file():
        return Weights(folder, read_header(folder / SINGLE))
    present = sorted(path.name for path in folder.iterdir() if path.is_file())
    loose = [name for name in present if name.endswith(".safetensors")]
    if loose:
        raise ValueError(
            f"{folder} has {_listed(loose)} and neither {SINGLE} nor {INDEX}: a single file must "
            "have that name, shards need their index"
        )
    pickled = [name for name in present if name.endswith(_PICKLED)]
    if pickled:
        raise ValueError(
            f"{folder} has its weights in {_listed(pickled)}, which can run code when they are "
            "opened: convert to safetensors first (load the model where you trust it and call "
            "save_pretrained)"
        )
    raise ValueError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}")


def _sharded(folder: Path) -> dict[str, Entry]:
    where = _weight_map(folder / INDEX)
    files = sorted(set(where.values()))
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        loose = sorted({path.name for path in folder.glob("*.safetensors")} - set(files))
        hint = f"; it names none of {_listed(loose)}, which are there" if loose else ""
        raise ValueError(f"{folder}: {INDEX} names {_listed(missing)}, missing here{hint}")
    entries: dict[str, Entry] = {}
    wrong = []
    for name in files:
        held = read_header(folder / name)
        said = {tensor for tensor, file in where.items() if file == name}
        wrong += [
            f"{tensor} is said to be in {name}, which has no such" for tensor in said - {*held}
        ]
        wrong += [f"{name} has {tensor}, of which it says nothing" for tensor in {*held} - said]
        entries |= held
    if wrong:
        raise ValueError(
            f"{folder}: {INDEX} disagrees with the files: {_listed(sorted(wrong), '; ')}"
        )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} is not JSON: {error}") from error
    where = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no table weight_map")
    for tensor, name in where.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith("safetensors"):
            raise ValueError(
                f"{index}: {tensor} in {name!r}: must be a .safetensors file beside it"
            )
    return where


def _listed(names: list[str], between: str = ", ") -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return between.join(names[:_SHOWN]) + more

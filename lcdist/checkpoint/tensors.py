"""Tensors of our checkpoints, written without a model and read without one, a few rows at a time.

What is written is what Megatron's `dist_checkpointing` would have saved: its two small files beside
torch's sharded format, each tensor under its name in the whole model. Any mesh loads it. torch asks
a planner for each piece when it is about to write it, so a piece need not exist before.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.checkpoint.read import Checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy

# A piece of a tensor: what a reader of a part of it has to fetch at least.
PIECE_BYTES = 2**23


@dataclass(frozen=True)
class Tensors:
    """What one tensor of a checkpoint will be. rows(first, stop) gives its rows when asked."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """(first row, row after the last) of each piece, of PIECE_BYTES or one row at most."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, PIECE_BYTES // row)
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])


def write_tensors(folder: Path, tensors: Sequence[Tensors]) -> None:
    """Write `tensors` into the empty `folder`, as a checkpoint without its manifest.

    A world must have been started. Holds one piece at a time; each tensor has a file of its own.
    Raises ValueError where one cannot be read or written.
    """
    TorchCommonSaveStrategy("torch", 1).save_common({}, folder)
    writer = _Writer(folder, single_file_per_rank=True, thread_count=1)
    try:
        save({}, storage_writer=writer, planner=_Lazy(tensors))
    except CheckpointException as error:
        causes = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
        raise ValueError(f"{folder} could not be written: {'; '.join(sorted(causes))}") from error
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _Writer(FileSystemWriter):
    """torch's, with a file for each tensor, and no Path in the metadata.

    No checkpoint may ask for one to be unpickled.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """torch's own, once for each tensor, the file named by its number."""
        results: list[WriteResult] = []
        for number, key in enumerate(dict.fromkeys(item.index.fqn for item in plan.items)):
            items = [item for item in plan.items if item.index.fqn == key]
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = replace(plan, items=items, storage_data=prefix)
            results += super().write_data(part, planner).wait()
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta:
        """What tells this save from others."""
        return StorageMeta(checkpoint_id=str(self.path), save_id=self.save_id)


class _Lazy(SavePlanner):
    """Plans every piece, and makes each when torch is about to write it."""

    def __init__(self, tensors: Sequence[Tensors]) -> None:
        self._tensors = {one.key: one for one in tensors}
        self._plan: SavePlan | None = None

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Nothing to prepare: the tensors came with the constructor."""

    def create_local_plan(self) -> SavePlan:
        """All pieces: there is no other rank."""
        return SavePlan([item for one in self._tensors.values() for item in _items(one)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """torch's own, from the pieces."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        self._plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The piece, from wherever it comes."""
        assert write_item.tensor_data is not None and write_item.index.offset is not None
        one = self._tensors[write_item.index.fqn]
        first, size = write_item.index.offset[0], write_item.tensor_data.chunk.sizes
        piece = one.rows(first, first + size[0])
        assert piece.shape == size and piece.dtype == one.dtype, (one.key, piece.shape, size)
        return piece


def _items(one: Tensors) -> Iterator[WriteItem]:
    for first, stop in one.pieces():
        offsets = torch.Size([first, *(0 for _ in one.shape[1:])])
        chunk = ChunkStorageMetadata(offsets, torch.Size([stop - first, *one.shape[1:]]))
        data = TensorWriteData(chunk, TensorProperties(dtype=one.dtype), torch.Size(one.shape))
        yield WriteItem(MetadataIndex(one.key, offsets), WriteItemType.SHARD, tensor_data=data)


class Stored:
    """The weights of a checkpoint that has been opened, read from disk whenever they are asked for.

    Its metadata has passed `open_checkpoint`, which lets no foreign code through; torch reads the
    pieces with `weights_only`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._held: tuple[str, torch.Size] | None = None
        self._last = torch.empty(0)
        self._reader = FileSystemReader(checkpoint.path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        everything: Mapping[str, Any] = metadata.state_dict_metadata
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: one
            for key, one in everything.items()
            if isinstance(one, TensorStorageMetadata) and not key.startswith(("optimizer.", "rng."))
        }

    @property
    def names(self) -> list[str]:
        """The names of the weights: no optimizer's, no random state."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Its shape, padding of the vocabulary included."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """What it is stored in."""
        return self._tensors[key].properties.dtype

    def pieces(self, key: str, stop: int) -> list[tuple[int, int]]:
        """Rows 0 to `stop` in the intervals that it was written in, each read at one go."""
        starts = {chunk.offsets[0] for chunk in self._tensors[key].chunks}
        ends = [*sorted(start for start in starts if start < stop), stop]
        return list(zip(ends[:-1], ends[1:], strict=True))

    def rows(self, key: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Rows first to stop of the tensor `key`, in memory of their own."""
        stored = self._tensors[key]
        stop = stored.size[0] if stop is None else stop
        out = torch.empty(stop - first, *stored.size[1:], dtype=stored.properties.dtype)
        for chunk in stored.chunks:
            begin, *left = chunk.offsets
            size, *widths = chunk.sizes
            a, b = max(first, begin), min(stop, begin + size)
            if a < b:
                place = out[a - first : b - first]
                for dim, (offset, width) in enumerate(zip(left, widths, strict=True), 1):
                    place = place.narrow(dim, offset, width)
                place.copy_(self._piece(key, chunk)[a - begin : b - begin])
        return out

    def _piece(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A piece as it was written; the last one is kept, since readers go row by row."""
        if (key, chunk.offsets) != self._held:
            self._last = torch.empty(0)
            stored = self._tensors[key]
            held = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
            items = create_read_items_for_chunk_list(key, stored, [chunk])
            self._reader.read_data(LoadPlan(items), _Into(held)).wait()
            self._held, self._last = (key, chunk.offsets), held
        return self._last


class _Into(DefaultLoadPlanner):
    """Puts what is read where it belongs in one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of the tensor that the piece fills."""
        place = self._out
        for dim, (first, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            place = place.narrow(dim, first, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: it has been copied into its place."""

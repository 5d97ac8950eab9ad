"""Read and write the tensors of a checkpoint some rows at a time, without a model.

The files are those of Megatron's `dist_checkpointing`: its two small files and torch's sharded
format, with each tensor under its name in the whole model. Any mesh loads them. torch asks the
planner for each piece when it writes it, so that only one piece exists at a time.
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

from lcdist.checkpoint.manifest import Checkpoint
from lcdist.checkpoint.writer import write_format, write_rest
from lcdist.utils.progress import Progress, counter, silent

# Size of a piece: a reader of any part of it reads all of it.
PIECE_BYTES = 2**23


@dataclass(frozen=True)
class TensorSource:
    """A tensor to write. rows(first, stop): function that returns its rows first to stop."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Callable[[int, int], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield (first, stop) rows of each piece, of at most PIECE_BYTES or one row."""
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        step = max(1, PIECE_BYTES // row)
        for first in range(0, self.shape[0], step):
            yield first, min(first + step, self.shape[0])


def write_tensors(
    folder: Path, tensors: Sequence[TensorSource], progress: Progress = silent
) -> None:
    """Write `tensors` into the empty `folder` as a checkpoint without a manifest.

    A world of one process must have been started. One piece is held at a time; each tensor has its
    own file.

    Raises:
        ValueError: a tensor cannot be read or written.
    """
    write_rest({}, folder)
    writer = _FilePerTensorWriter(folder, single_file_per_rank=True, thread_count=1)
    try:
        save({}, storage_writer=writer, planner=_StreamingPlanner(tensors, progress))
    except CheckpointException as error:
        causes = {f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()}
        raise ValueError(f"{folder} could not be written: {'; '.join(sorted(causes))}") from error
    write_format(folder)


class _FilePerTensorWriter(FileSystemWriter):
    """torch's writer with one file per tensor and no Path in the metadata.

    Our checkpoints must not unpickle a Path, see `_ALLOWED_CLASSES` in `lcdist.checkpoint.read`.
    """

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Call torch's method for each tensor, with the tensor's number in the file name."""
        results: list[WriteResult] = []
        for number, key in enumerate(dict.fromkeys(item.index.fqn for item in plan.items)):
            items = [item for item in plan.items if item.index.fqn == key]
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            tensor_plan = replace(plan, items=items, storage_data=prefix)
            results += super().write_data(tensor_plan, planner).wait()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def storage_meta(self) -> StorageMeta:
        """Return the identity of this save, with the path as text."""
        return StorageMeta(checkpoint_id=str(self.path), save_id=self.save_id)


class _StreamingPlanner(SavePlanner):
    """Plans all pieces, and reads each one when torch writes it."""

    def __init__(self, tensors: Sequence[TensorSource], progress: Progress) -> None:
        self._tensors = {tensor.key: tensor for tensor in tensors}
        self._count = counter("writing", sum(t.nbytes for t in tensors), progress)
        self._plan: SavePlan | None = None

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        """Do nothing: the constructor has the tensors."""

    def create_local_plan(self) -> SavePlan:
        """Plan all pieces: there is no other rank."""
        sources = self._tensors.values()
        return SavePlan([item for source in sources for item in _write_items(source)])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Merge plans as torch's default planner does."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Accept the plan unchanged."""
        self._plan = new_plan
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Read the piece."""
        assert write_item.tensor_data is not None and write_item.index.offset is not None
        source = self._tensors[write_item.index.fqn]
        first, size = write_item.index.offset[0], write_item.tensor_data.chunk.sizes
        piece = source.rows(first, first + size[0])
        assert piece.shape == size and piece.dtype == source.dtype, (source.key, piece.shape, size)
        self._count(piece.nbytes)
        return piece


def _write_items(source: TensorSource) -> Iterator[WriteItem]:
    dtype, shape = TensorProperties(dtype=source.dtype), torch.Size(source.shape)
    for first, stop in source.pieces():
        offsets = torch.Size([first, *(0 for _ in shape[1:])])
        chunk = ChunkStorageMetadata(offsets, torch.Size([stop - first, *shape[1:]]))
        data = TensorWriteData(chunk, dtype, shape)
        yield WriteItem(MetadataIndex(source.key, offsets), WriteItemType.SHARD, tensor_data=data)


class CheckpointTensors:
    """The weights of a checkpoint, read from disk at each access.

    `open_checkpoint` has checked that the metadata runs no foreign code; torch reads the tensors
    with `weights_only`.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._cached_chunk: tuple[str, torch.Size] | None = None
        self._cache = torch.empty(0)
        self._reader = FileSystemReader(checkpoint.path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        entries: Mapping[str, Any] = metadata.state_dict_metadata
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata)
            and not key.startswith(("optimizer.", "rng."))
        }

    @property
    def names(self) -> list[str]:
        """Names of the weights, without optimizer state and random state."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a tensor, padding of the vocabulary included."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the stored dtype of a tensor."""
        return self._tensors[key].properties.dtype

    def pieces(self, key: str, stop: int) -> list[tuple[int, int]]:
        """Return rows 0 to `stop` as (first, stop) of the pieces they were written in."""
        starts = {chunk.offsets[0] for chunk in self._tensors[key].chunks}
        ends = [*sorted(start for start in starts if start < stop), stop]
        return list(zip(ends[:-1], ends[1:], strict=True))

    def rows(self, key: str, first: int = 0, stop: int | None = None) -> Tensor:
        """Return a copy of rows first to stop of a tensor."""
        entry = self._tensors[key]
        stop = entry.size[0] if stop is None else stop
        out = torch.empty(stop - first, *entry.size[1:], dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            chunk_first, *offsets = chunk.offsets
            chunk_rows, *widths = chunk.sizes
            begin, end = max(first, chunk_first), min(stop, chunk_first + chunk_rows)
            if begin < end:
                target = out[begin - first : end - first]
                for dim, (offset, width) in enumerate(zip(offsets, widths, strict=True), 1):
                    target = target.narrow(dim, offset, width)
                target.copy_(self._read_chunk(key, chunk)[begin - chunk_first : end - chunk_first])
        return out

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """Read a piece as it was written; the last one is cached, since readers go row by row."""
        if (key, chunk.offsets) != self._cached_chunk:
            self._cache = torch.empty(0)
            entry = self._tensors[key]
            data = torch.empty(chunk.sizes, dtype=entry.properties.dtype)
            items = create_read_items_for_chunk_list(key, entry, [chunk])
            self._reader.read_data(LoadPlan(items), _CopyPlanner(data)).wait()
            self._cached_chunk, self._cache = (key, chunk.offsets), data
        return self._cache


class _CopyPlanner(DefaultLoadPlanner):
    """Copies what is read into one tensor."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self._out = out

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of the tensor that the piece fills."""
        target = self._out
        for dim, (first, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, first, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: the piece has been copied into the tensor."""

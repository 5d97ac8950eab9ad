"""What lies in a checkpoint on disk, read without Megatron and without processes."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load


def stored_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's folder, whole, by its key."""
    reader = FileSystemReader(checkpoint)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {k: torch.zeros(m.size, dtype=m.properties.dtype) for k, m in metadata.items()}
    load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_tensors(found: Path, expected: Path) -> None:
    """Fails unless both checkpoints hold the same tensors, bit for bit."""
    ours, theirs = stored_tensors(found), stored_tensors(expected)
    assert ours.keys() == theirs.keys()
    different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
    assert not different, f"{found} and {expected} differ in {different}"

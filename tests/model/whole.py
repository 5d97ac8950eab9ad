"""Whole-model tensors by name, gathered from all ranks: what makes two meshes comparable.

Where a local tensor lies in the whole one is what the sharded state dict says of it, the same
description under which it is saved.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.engines.engine import ForwardEngine, TrainEngine
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

Shard = tuple[str, tuple[int, ...], tuple[int, ...], Tensor]


def gather_weights(engine: ForwardEngine) -> dict[str, Tensor]:
    """Return every parameter of the model, whole, by name; on rank 0, elsewhere empty.

    All ranks call it. Fails if ranks that hold the same piece hold different bits, or if no rank
    holds an element.
    """
    return _assemble([s for entry in _entries(engine) for s in _shards(entry, entry.data.detach())])


def gather_gradients(engine: TrainEngine) -> dict[str, Tensor]:
    """Return every parameter's fp32 gradient as `gather_weights` does; 0 for frozen parameters."""
    entries = list(_entries(engine))
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, [entry.key for entry in entries])
    found: dict[str, Tensor] = {}
    # Only one of the ranks that call for a gradient may describe where it lies.
    for name in sorted({name for names in gathered for name in names}):
        with suppress(KeyError):
            found[name] = engine.gradient(name)
    return _assemble([s for e in entries for s in _shards(e, _gradient(found, e))])


def gather_moments(engine: TrainEngine) -> dict[str, Tensor]:
    """Return the optimizer's tensors as `gather_weights` does, named "exp_avg.NAME" and so on.

    Only a parameter's owner names its state, so every piece comes once.
    """
    shards = [
        s for entry in nested_values(engine.state_dict()["optimizer"]) for s in _pieces(entry)
    ]
    return _assemble([(k.removeprefix("optimizer."), *rest) for k, *rest in shards])


def _entries(engine: ForwardEngine) -> Iterator[Any]:
    for entry in nested_values(engine.state_dict(weights_only=True)["model"]):
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            yield entry


def _gradient(found: Mapping[str, Tensor], entry: Any) -> Tensor:
    return found[entry.key] if entry.data.requires_grad else torch.zeros_like(entry.data)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """One short word for all bits of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _shards(entry: Any, tensor: Tensor) -> Iterator[Shard]:
    yield from _pieces(make_sharded_optimizer_tensor(entry, tensor, "_"))


def _pieces(entry: Any) -> Iterator[Shard]:
    built = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for piece in built:
        data = piece.data.detach().clone()
        yield piece.key.removeprefix("_."), piece.global_shape, piece.global_offset, data


def _assemble(mine: list[Shard]) -> dict[str, Tensor]:
    gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, gathered)
    whole: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for key, shape, offset, data in [shard for shards in gathered or [] for shard in shards]:
        if key not in whole:
            whole[key] = torch.zeros(shape, dtype=data.dtype)
            seen[key] = torch.zeros(shape, dtype=torch.bool)
        place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
        known = seen[key][place]
        assert torch.equal(whole[key][place][known], data[known]), f"replicas of {key} differ"
        whole[key][place] = data
        seen[key][place] = True
    for key, places in seen.items():
        assert places.all(), f"no rank holds all of {key}"
    return whole

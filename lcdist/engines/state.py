"""Model weights and random states as Megatron's sharded tensors, for checkpoints.

Keys are whole-model names (`decoder.layers.3...`), independent of rank, so that any mesh can load
what any mesh saved.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.hardware.device import has_cuda
from lcdist.model.init import whole_model_names
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker

# One key per layer instead of one stack for all: layers may differ in method and parameters.
_METADATA = {"non_homogeneous_layers": True}
_EXTRA = "_extra_state"


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Return the sharded weights of this rank's model chunks.

    Megatron's `_extra_state` entries are left out: they are empty, and stored as pickled bytes.
    """
    states = {}
    for i, chunk in enumerate(chunks):
        sharded = chunk.sharded_state_dict(metadata=dict(_METADATA))  # type: ignore[operator]
        states[f"chunk{i}"] = {k: v for k, v in sharded.items() if not k.endswith(_EXTRA)}
    return states


def load_model_state(chunks: Sequence[nn.Module], loaded: dict[str, Any]) -> None:
    """Copy loaded weights into the chunks; `loaded` must contain every parameter."""
    for i, chunk in enumerate(chunks):
        result = chunk.load_state_dict(loaded[f"chunk{i}"], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith(_EXTRA)]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)


def load_whole_tensors(
    chunks: Sequence[nn.Module],
    tensors: Mapping[str, Callable[[], Tensor]],
    tp_rank: int,
    opened: Callable[[nn.Parameter], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Fill parameters from whole tensors; padding rows of a vocabulary table stay as they are.

    Args:
        chunks: this rank's model chunks.
        tensors: by whole-model name, a function that reads the tensor; called only for parameters
            that a chunk holds.
        tp_rank: this rank's number among the tensor-parallel ranks.
        opened: returns a context in which a parameter can be written.
    """
    with torch.no_grad():
        for chunk in chunks:
            names = whole_model_names(chunk)
            for local, parameter in chunk.named_parameters():
                if names[local] in tensors:
                    with opened(parameter):
                        _fill(parameter, tensors[names[local]](), tp_rank)


def _fill(parameter: nn.Parameter, whole: Tensor, tp_rank: int) -> None:
    shard = parameter.data
    if getattr(parameter, "tensor_model_parallel", False):
        dim: int = parameter.partition_dim  # type: ignore[attr-defined]
        first = min(tp_rank * shard.shape[dim], whole.shape[dim])
        count = min(shard.shape[dim], whole.shape[dim] - first)
        whole, shard = whole.narrow(dim, first, count), shard.narrow(dim, 0, count)
    else:
        shard = shard[: len(whole)]
    shard.copy_(whole)


def random_states() -> dict[str, Tensor]:
    """Return this rank's random states by name: torch's, and Megatron's for dropout."""
    states = {"cpu": torch.get_rng_state()}
    if has_cuda():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in _tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return states


def sharded_random_states(rank: int, world_size: int) -> dict[str, Any]:
    """Return the random states as sharded tensors: one row per rank, this rank's filled in."""
    return {
        name: ShardedTensor.from_rank_offsets(
            f"rng.{name}", state.cpu(), (0, rank, world_size), prepend_axis_num=1
        )
        for name, state in random_states().items()
    }


def load_random_states(loaded: dict[str, Tensor]) -> None:
    """Set torch's and Megatron's generators to loaded random states."""
    torch.set_rng_state(loaded["cpu"])
    if has_cuda():
        torch.cuda.set_rng_state(loaded["cuda"])
    prefix = "tracker."
    tracked = {k.removeprefix(prefix): v for k, v in loaded.items() if k.startswith(prefix)}
    _tracker().set_states(tracked)


def _tracker() -> Any:
    return get_cuda_rng_tracker()

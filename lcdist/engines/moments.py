"""Optimizer state as sharded tensors, named as the parameters: the same for every engine.

Each parameter has one owner among the ranks that hold it, which names the state alone. So a run
that one engine has begun goes on under another, and on another mesh.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor


def entries_by_parameter(model_state: Any) -> dict[int, Any]:
    """Return the entry of each parameter in a sharded state dict of the model, by its `id`."""
    return {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def owned(entry: Any, data: Tensor) -> Any:
    """Return an entry with other data, which only its owner in the DP x CP group has."""
    return replace(entry, data=data, replica_id=(*entry.replica_id[:-1], 0))


def sharded_moments(
    parameters: Sequence[nn.Parameter],
    states: Sequence[Mapping[str, Tensor]],
    entries: Mapping[int, Any],
) -> dict[str, Any]:
    """Return optimizer state, sharded like the parameters.

    Args:
        parameters: those that this rank owns.
        states: the state of each by its kind: "exp_avg", "exp_avg_sq", and "master" for weights
            that are not fp32; of the local shape of the parameter.
        entries: as of `entries_by_parameter`.
    """
    return {
        str(number): {
            kind: owned(
                make_sharded_optimizer_tensor(entries[id(parameter)], tensor, f"optimizer.{kind}"),
                tensor,
            )
            for kind, tensor in state.items()
        }
        for number, (parameter, state) in enumerate(zip(parameters, states, strict=True))
    }


def assign_owners(sizes: Sequence[int], count: int) -> list[int]:
    """Return an owner in 0..count-1 for each tensor.

    Assigns tensors from the largest to the smallest, each to the owner with the fewest elements.
    """
    load = [0] * count
    owners = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = min(range(count), key=lambda rank: (load[rank], rank))
        owners[index] = owner
        load[owner] += sizes[index]
    return owners

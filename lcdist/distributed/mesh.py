"""The device mesh [pp, dp, cp, tp]: build the process groups with Megatron, once.

All other code reads ranks and sizes from `Mesh` and does not compute them.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import lcdist.hardware.megatron_on_cpu  # noqa: F401
from lcdist.config.schema import ParallelConfig
from lcdist.hardware.device import backend, device
from megatron.core import parallel_state, tensor_parallel


@dataclass(frozen=True)
class Mesh:
    """Ranks, sizes and process groups of this process on each axis of the mesh.

    `dp_cp_group` contains the ranks that hold the same parameters. `device` is the device of this
    process.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    device: torch.device

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank's pipeline stage computes the loss."""
        return self.pp_rank == self.pp_size - 1


def local_rank() -> int:
    """Return the number of this process on its machine, from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes that the launcher started on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_world(timeout: float) -> None:
    """Join torchrun's world, or start a world of one process; do nothing if a world exists.

    Args:
        timeout: seconds that a collective waits for a missing rank before it fails.
    """
    if dist.is_initialized():
        return
    where = device(local_rank())
    if where.type == "cuda":
        torch.cuda.set_device(where)
    limit = timedelta(seconds=timeout)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend(), timeout=limit)
    else:
        alone = {"rank": 0, "world_size": 1, "timeout": limit}
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend(), store=store, **alone)


def build_mesh(parallel: ParallelConfig, seed: int) -> Mesh:
    """Build the mesh over the current world; replace a mesh that this process built before.

    Args:
        parallel: sizes of the axes, which the plan has checked.
        seed: seed of Megatron's random states.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.vp_size if parallel.vp_size > 1 else None,
        context_parallel_size=parallel.cp_size,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=parallel.timeout / 60,  # pyright: ignore[reportArgumentType]
    )
    # With sequence parallelism Megatron's embedding forks this state even without dropout.
    tensor_parallel.model_parallel_cuda_manual_seed(seed + 1)
    # Megatron annotates its getters as optional, although they never return None.
    ps: Any = parallel_state
    where, cp_group = device(local_rank()), ps.get_context_parallel_group()
    # NCCL creates a communicator at a group's first collective, which all ranks must join. A shift
    # between a few ranks must therefore not be the first.
    dist.all_reduce(torch.zeros(1, device=where), group=cp_group)
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.cp_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pp_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=ps.get_tensor_model_parallel_group(),
        cp_group=cp_group,
        pp_group=ps.get_pipeline_model_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
        dp_cp_group=ps.get_data_parallel_group(with_context_parallel=True),
        device=where,
    )


def end_mesh() -> None:
    """Close the process groups of the mesh; the world stays."""
    # All groups in creation order, which is the same on every rank; None stands for the world.
    groups = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in {id(one): one for one in groups if one is not None}.values():
        dist.destroy_process_group(group)


def end_world() -> None:
    """Leave the world: discard the mesh and close all process groups."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def least_of_ranks(number: int) -> int:
    """Return the least of all ranks' numbers; all ranks call it."""
    numbers = [number] * dist.get_world_size()
    dist.all_gather_object(numbers, number)
    return min(numbers)

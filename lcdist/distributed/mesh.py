"""The world as a mesh [pp, dp, cp, tp]: builds the process groups through Megatron, once.

From here on nobody finds out by arithmetic which rank it is: `Mesh` says so.
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
    """This process's place in the mesh, and the groups it talks to.

    Sizes and ranks are counted along one axis each; `dp_cp_group` joins the ranks that hold the
    same parameters. `device` is where this process computes.
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
        """Whether this rank's pipeline stage computes the loss."""
        return self.pp_rank == self.pp_size - 1


def local_rank() -> int:
    """This process's number on its machine, as the launcher gave it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes the launcher started in all."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_world(timeout: float) -> None:
    """Join the world that torchrun describes in the environment; alone, a world of one.

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
    """The mesh over the world that has been started; `seed` seeds Megatron's random states.

    Replaces a mesh built earlier in this process. Sizes are taken as checked by the plan.
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
    # Megatron's annotations allow what its functions never return.
    ps: Any = parallel_state
    where, cp_group = device(local_rank()), ps.get_context_parallel_group()
    # NCCL makes a communicator at a group's first collective, and all ranks must take part in
    # that; a shift between a few of them would be a poor first.
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
    """Forget the mesh, and close its process groups; the world goes on."""
    # Groups that every rank of the world made, in one order, and the world itself as None.
    made = parallel_state._global_process_group_list or []
    parallel_state.destroy_model_parallel()
    for group in {id(one): one for one in made if one is not None}.values():
        dist.destroy_process_group(group)


def end_world() -> None:
    """Leave the world: forget the mesh and close the process groups."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()

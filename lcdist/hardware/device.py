"""What this process computes on: the one place in the library that asks for CUDA."""

import torch


def has_cuda() -> bool:
    """Whether tensors live on a GPU."""
    return torch.cuda.is_available()


def device(local_rank: int) -> torch.device:
    """The device of the process with this number on its machine."""
    return torch.device("cuda", local_rank) if has_cuda() else torch.device("cpu")


def backend() -> str:
    """torch.distributed's backend: NCCL for GPU tensors, gloo for everything else."""
    return "cpu:gloo,cuda:nccl" if has_cuda() else "gloo"

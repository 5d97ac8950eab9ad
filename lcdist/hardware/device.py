"""What this process computes on: the one place in the library that asks for CUDA."""

import platform
import re
from pathlib import Path

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


def device_name(device: torch.device) -> str:
    """Return the vendor's name of the device; for a CPU also the number of torch threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine() or "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''} a rank"

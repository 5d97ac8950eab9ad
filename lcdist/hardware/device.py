"""The device of this process: the one place in the library that asks torch for CUDA."""

import platform
import re
from pathlib import Path

import psutil
import torch

from lcdist.hardware.gpu_specs import Hardware, find_gpu


def has_cuda() -> bool:
    """Return whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device(local_rank: int) -> torch.device:
    """Return the device of the process with number `local_rank` on its machine."""
    return torch.device("cuda", local_rank) if has_cuda() else torch.device("cpu")


def backend() -> str:
    """Return torch.distributed's backend: NCCL for GPU tensors, gloo for everything else."""
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


def this_machine() -> Hardware:
    """Return the hardware that this process runs on: its GPU, else the CPU of its host."""
    if not has_cuda():
        return Hardware("CPU", "cpu", psutil.virtual_memory().total)
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = find_gpu(found.name)
    flops = known.bf16_flops if known else None
    return Hardware(found.name, "cuda", found.total_memory, flops)


def wait_for_device(device: torch.device) -> None:
    """Wait until the GPU has finished all queued work; return at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

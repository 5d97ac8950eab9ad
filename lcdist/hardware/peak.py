"""Measure the peak FLOP/s of a device, the peak memory of a process, and MFU.

Model FLOPs utilisation (MFU) is the model's FLOPs per second over the peak FLOP/s of all devices
(arXiv:2204.02311, appendix B).
"""

import re
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lcdist.hardware.gpu_specs import find_gpu

ROUNDS = 10


@dataclass(frozen=True)
class Peak:
    """Peak FLOP/s of one device, and the source of the figure."""

    flops: float
    source: Literal["config", "data sheet", "measured"]


def device_peak(device: torch.device, dtype: torch.dtype, configured_tflops: float = 0.0) -> Peak:
    """Return the peak of `device` for matrix products in `dtype`.

    Args:
        device: The device.
        dtype: Of the factors.
        configured_tflops: The user's figure in TFLOP/s (`log.peak_tflops`); 0: none. Without it, a
            known GPU in bf16 has the data sheet's figure; everything else is measured, in a
            fraction of a second.
    """
    if configured_tflops > 0:
        return Peak(configured_tflops * 1e12, "config")
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = find_gpu(torch.cuda.get_device_name(device))
        if known is not None and known.bf16_flops is not None:
            return Peak(known.bf16_flops, "data sheet")
    return Peak(measure_flops(device, dtype), "measured")


def measure_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Measure FLOP/s of a square matrix product on `device` for about `seconds`."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.full((n, n), 0.5, device=device, dtype=dtype)
    b = torch.full((n, n), 0.25, device=device, dtype=dtype)
    out = torch.zeros_like(a)
    _time_products(a, b, out, 2)
    repeats = max(1, int(seconds / ROUNDS / _time_products(a, b, out, 1)))
    # Take the fastest round: others are slowed by other processes on the device.
    return 2 * n**3 * repeats / min(_time_products(a, b, out, repeats) for _ in range(ROUNDS))


def _time_products(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
    """Return the seconds that `repeats` products take, never zero."""
    if a.device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        return max(start.elapsed_time(end) / 1e3, 1e-9)
    begun = time.perf_counter()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    return max(time.perf_counter() - begun, 1e-9)


def mfu(flops_per_token: float, tokens_per_second: float, peak: Peak, world_size: int) -> float:
    """Return model FLOPs utilisation, a fraction of 1.

    Args:
        flops_per_token: Of forward and backward.
        tokens_per_second: Over all ranks.
        peak: Of one device.
        world_size: Number of devices.
    """
    return flops_per_token * tokens_per_second / (peak.flops * world_size)


def peak_memory(device: torch.device) -> int:
    """Return peak bytes of this process: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss survives exec, so that under a launcher it can be the parent's; VmHWM cannot.
        match = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if match:
            return int(match[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def max_over_ranks(
    values: Mapping[str, int], group: ProcessGroup | None, device: torch.device
) -> dict[str, int]:
    """Return each value's maximum over ranks.

    Args:
        values: Values by name; every rank passes the same names in the same order.
        group: The ranks; None for one process.
        device: A device on which the group can reduce a tensor.
    """
    if group is None:
        return dict(values)
    vector = torch.tensor(list(values.values()), dtype=torch.int64, device=device)
    dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=group)
    return dict(zip(values, vector.tolist(), strict=True))

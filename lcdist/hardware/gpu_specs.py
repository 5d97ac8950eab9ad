"""Facts about machines: memory and peak FLOP/s of known GPUs, from the makers' data sheets.

No torch in here, so that a configuration can be planned for a GPU where torch finds none.
"""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Hardware:
    """One device that a rank runs on, as the plan needs to know it.

    Attributes:
        name: The device's name, for messages.
        kind: torch's device type.
        memory_bytes: Memory of the device; of the whole host for a CPU.
        bf16_flops: Peak FLOP/s of dense bf16 matrix products; None where unknown.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    memory_bytes: int
    bf16_flops: float | None = None


def _gpu(name: str, gibibytes: int, bf16_tflops: float) -> Hardware:
    return Hardware(name, "cuda", gibibytes * 2**30, bf16_tflops * 1e12)


# By the words of the device's name; a name with more words stands before one with fewer.
# Data sheets give memory in units of 2**30 bytes; ECC and the driver take up to 6 % of it.
# FLOP/s are dense: figures given "with sparsity" are halved. ROCm shows an MI250X as two devices,
# so its figures are per die.
GPU_SPECS: dict[str, Hardware] = {
    "h200-nvl": _gpu("NVIDIA H200 NVL", 141, 835.5),
    "h200": _gpu("NVIDIA H200", 141, 989.4),
    "gh200-144g": _gpu("NVIDIA GH200 144G", 144, 989.4),
    "gh200": _gpu("NVIDIA GH200", 96, 989.4),
    "h100-nvl": _gpu("NVIDIA H100 NVL", 94, 835.5),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 80, 756.5),
    "h100": _gpu("NVIDIA H100", 80, 989.4),
    "a100-40gb": _gpu("NVIDIA A100 40GB", 40, 312.0),
    "a100": _gpu("NVIDIA A100 80GB", 80, 312.0),
    "b200": _gpu("NVIDIA B200", 180, 2250.0),
    "l40s": _gpu("NVIDIA L40S", 48, 362.05),
    "l4": _gpu("NVIDIA L4", 24, 121.0),
    "a40": _gpu("NVIDIA A40", 48, 149.7),
    "a10": _gpu("NVIDIA A10", 24, 125.0),
    "mi325x": _gpu("AMD Instinct MI325X", 256, 1307.4),
    "mi300x": _gpu("AMD Instinct MI300X", 192, 1307.4),
    "mi250x": _gpu("AMD Instinct MI250X", 64, 191.5),
}


def find_gpu(device_name: str) -> Hardware | None:
    """Return the data sheet of the GPU that the driver calls `device_name`.

    None where it is unknown or a MIG slice, which has a part of the figures.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if "mig" in words:
        return None
    return next((gpu for key, gpu in GPU_SPECS.items() if words.issuperset(key.split("-"))), None)

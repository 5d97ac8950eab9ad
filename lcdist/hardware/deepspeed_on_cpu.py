"""Import DeepSpeed, on hosts without CUDA, too."""

import logging
import os
from typing import Any

from lcdist.hardware.device import has_cuda


def import_deepspeed() -> Any:
    """Return the package without its messages; on a CPU nothing of it is compiled."""
    if not has_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torchrun sets it; a process that was started alone is the only one of its machine.
    os.environ.setdefault("LOCAL_RANK", "0")
    # The package is optional, and it takes a second.
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not has_cuda():
        # An all-reduce through shared memory, which g++ would compile for two minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def has_async_io() -> bool:
    """Return whether DeepSpeed can build what offload to a disk needs."""
    return import_deepspeed().ops.op_builder.AsyncIOBuilder().is_compatible(verbose=False)

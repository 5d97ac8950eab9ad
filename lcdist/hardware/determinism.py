"""Make this process compute the same bits in every run of the same steps on the same machine.

Our own kernels sum in a fixed order in any case. This is for what torch and its libraries do
otherwise on a GPU: cuBLAS with several streams, atomic additions in torch's own kernels, cuDNN's
choice by timing. Libraries for attention whose backward adds atomically are passed over
(`lcdist_kernels.full.library_choice`). NCCL sums in an order that follows from the message's size
and the topology, so another number of ranks or another network gives other bits.
"""

import os

import torch

# Two workspaces of a fixed size: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
WORKSPACE = ":4096:8"


def make_deterministic(wanted: bool) -> None:
    """Turn torch's deterministic mode on or off; call it before the first kernel is launched.

    In this mode an operation of torch that has only a form with another order in every run raises
    RuntimeError, with its name.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    # Memory from `empty` would be filled first, which costs a pass; our kernels write all of it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]

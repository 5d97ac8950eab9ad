"""Without a GPU, Triton kernels run as Python on CPU tensors: to be asked for before any import."""

import os

import torch


def interpret_without_gpu() -> None:
    """Sets TRITON_INTERPRET=1 unless there is a GPU or it is set; child processes inherit it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

"""Tensorized (lexicographic) attention: hops over the modes of a sequence, one branch per mode."""

from lcdist_kernels.tensorized.grid import (
    ModeGrid,
    branch_pairs,
    check_bias,
    check_documents,
    initial_bias,
)
from lcdist_kernels.tensorized.impl import TensorizedImpl, select_tensorized_impl
from lcdist_kernels.tensorized.op import IMPLS, tensorized_attention
from lcdist_kernels.tensorized.reference import dense_hop, tensorized_reference
from lcdist_kernels.tensorized.sweeps import initial_bias_for
from lcdist_kernels.tensorized.tiled import (
    Branch,
    ModeRotary,
    Partial,
    coarsest_branch,
    fine_branch,
    merge_branch,
)

__all__ = [
    "IMPLS",
    "Branch",
    "ModeGrid",
    "Partial",
    "TensorizedImpl",
    "ModeRotary",
    "branch_pairs",
    "check_bias",
    "check_documents",
    "coarsest_branch",
    "dense_hop",
    "fine_branch",
    "initial_bias",
    "initial_bias_for",
    "merge_branch",
    "tensorized_attention",
    "select_tensorized_impl",
    "tensorized_reference",
]

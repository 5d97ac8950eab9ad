"""Tensorized (lexicographic) attention: hops over the modes of a sequence, a branch a mode."""

from lcdist_kernels.tensorized.decode import decode_step
from lcdist_kernels.tensorized.grid import (
    Grid,
    branch_pairs,
    check_bias,
    check_documents,
    initial_bias,
)
from lcdist_kernels.tensorized.op import BUILT, tensorized_attention
from lcdist_kernels.tensorized.reference import dense_hop, tensorized_reference
from lcdist_kernels.tensorized.tiled import (
    Branch,
    Partial,
    Turning,
    branch_bwd,
    branch_fwd,
    coarsest_branch,
    fine_branch,
    hop_bwd,
    hop_fwd,
    merge_branch,
    row_delta,
)

__all__ = [
    "BUILT",
    "Branch",
    "Grid",
    "Partial",
    "Turning",
    "branch_bwd",
    "branch_fwd",
    "branch_pairs",
    "check_bias",
    "check_documents",
    "coarsest_branch",
    "decode_step",
    "dense_hop",
    "fine_branch",
    "hop_bwd",
    "hop_fwd",
    "initial_bias",
    "merge_branch",
    "row_delta",
    "tensorized_attention",
    "tensorized_reference",
]

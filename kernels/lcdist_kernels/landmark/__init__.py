"""Landmark attention: landmarks gate past blocks, either all blocks or the top k."""

from lcdist_kernels.landmark.blocks import (
    BlockGrid,
    QueryRows,
    block_grid,
    block_starts,
    landmarks,
    unit_lengths,
)
from lcdist_kernels.landmark.impl import TORCH_IMPL, TRITON_IMPL, LandmarkImpl, select_landmark_impl
from lcdist_kernels.landmark.op import (
    IMPLS,
    SparseContext,
    SparseFunction,
    landmark_attention,
)
from lcdist_kernels.landmark.reference import landmark_partial, landmark_reference, sparse_partial
from lcdist_kernels.landmark.sparse import (
    BlockLists,
    keys_of,
    sparse_bwd,
    sparse_fwd,
    table_of,
)
from lcdist_kernels.landmark.tiled import landmark_bwd, landmark_fwd, sees_any
from lcdist_kernels.landmark.top_k import choose_blocks

__all__ = [
    "IMPLS",
    "TRITON_IMPL",
    "TORCH_IMPL",
    "BlockGrid",
    "LandmarkImpl",
    "SparseFunction",
    "BlockLists",
    "SparseContext",
    "QueryRows",
    "block_starts",
    "choose_blocks",
    "block_grid",
    "keys_of",
    "landmark_attention",
    "landmark_bwd",
    "landmark_fwd",
    "select_landmark_impl",
    "landmark_partial",
    "landmark_reference",
    "landmarks",
    "sparse_bwd",
    "sparse_fwd",
    "sparse_partial",
    "sees_any",
    "table_of",
    "unit_lengths",
]

"""Implementations of landmark attention over whole blocks: tiled torch or kernels."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.full import TRITON_IMPL as FULL_KERNEL
from lcdist_kernels.full import select_impl
from lcdist_kernels.landmark import launch, sparse, sparse_launch, tiled, top_k, top_k_launch


class LandmarkImpl(NamedTuple):
    """Forward and backward functions; `tiled` and `sparse` describe their semantics."""

    fwd: Callable[..., tuple[Tensor, Tensor]]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    own_fwd: Callable[..., tuple[Tensor, Tensor]]
    own_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    sparse_fwd: Callable[..., tuple[Tensor, Tensor]]
    sparse_bwd: Callable[..., tuple[Tensor, Tensor]]
    choose_blocks: Callable[..., Tensor]
    local_fwd: Callable[..., tuple[Tensor, Tensor]]
    local_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]


TORCH_IMPL = LandmarkImpl(
    tiled.landmark_fwd,
    tiled.landmark_bwd,
    tiled.own_fwd,
    tiled.own_bwd,
    sparse.sparse_fwd,
    sparse.sparse_bwd,
    top_k.choose_blocks,
    sparse.local_fwd,
    sparse.local_bwd,
)
TRITON_IMPL = LandmarkImpl(
    launch.landmark_fwd,
    launch.landmark_bwd,
    launch.own_fwd,
    launch.own_bwd,
    sparse_launch.sparse_fwd,
    sparse_launch.sparse_bwd,
    top_k_launch.choose_blocks,
    sparse_launch.local_fwd,
    sparse_launch.local_bwd,
)


def select_landmark_impl(impl: str, x: Tensor, what: str) -> LandmarkImpl:
    """Return the implementation that `impl` means for x; see `full.select_impl`."""
    return TRITON_IMPL if select_impl(impl, x, what) is FULL_KERNEL else TORCH_IMPL

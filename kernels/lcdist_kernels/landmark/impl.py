"""What carries landmark attention over whole blocks: tiled torch or kernels, by name."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.full import KERNEL as FULL_KERNEL
from lcdist_kernels.full import block_operator
from lcdist_kernels.landmark import launchers, listed, listed_launchers, tiled


class LandmarkOperator(NamedTuple):
    """Forward and backward of one semantics, as `tiled` and `listed` describe them."""

    fwd: Callable[..., tuple[Tensor, Tensor]]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    own_fwd: Callable[..., tuple[Tensor, Tensor]]
    own_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    listed_fwd: Callable[..., tuple[Tensor, Tensor]]
    listed_bwd: Callable[..., tuple[Tensor, Tensor]]


TILED = LandmarkOperator(
    tiled.landmark_fwd,
    tiled.landmark_bwd,
    tiled.own_fwd,
    tiled.own_bwd,
    listed.listed_fwd,
    listed.listed_bwd,
)
KERNEL = LandmarkOperator(
    launchers.landmark_fwd,
    launchers.landmark_bwd,
    launchers.own_fwd,
    launchers.own_bwd,
    listed_launchers.listed_fwd,
    listed_launchers.listed_bwd,
)


def landmark_operator(impl: str, x: Tensor, what: str) -> LandmarkOperator:
    """The operator that `impl`, "auto", "triton" or "torch", stands for with tensors like x.

    The choice is full attention's: see `block_operator`.
    """
    return KERNEL if block_operator(impl, x, what) is FULL_KERNEL else TILED

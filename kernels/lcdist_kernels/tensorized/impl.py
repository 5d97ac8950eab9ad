"""Implementations of tensorized attention: tiled torch or kernels."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.tensorized import launch, tiled
from lcdist_kernels.tensorized.tiled import Grads, Partial, Saved
from lcdist_kernels.triton_common import use_kernels


class TensorizedImpl(NamedTuple):
    """Functions of one implementation; `tiled` describes their semantics.

    The layout of lambda_j is private to an implementation; only its own backward reads it.
    """

    whole_fwd: Callable[..., Saved]
    whole_bwd: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    branch_fwd: Callable[..., Partial]
    branch_bwd: Callable[..., Grads]
    hop_fwd: Callable[..., tuple[Tensor, Tensor]]
    hop_bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]
    row_delta: Callable[[Tensor, Tensor], Tensor]


TORCH_IMPL = TensorizedImpl(
    tiled.whole_fwd, tiled.whole_bwd, tiled.branch_fwd, tiled.branch_bwd, tiled.hop_fwd,
    tiled.hop_bwd, tiled.row_delta,
)  # fmt: skip
TRITON_IMPL = TensorizedImpl(
    launch.whole_fwd, launch.whole_bwd, launch.branch_fwd, launch.branch_bwd, launch.hop_fwd,
    launch.hop_bwd, launch.row_delta,
)  # fmt: skip


def select_tensorized_impl(impl: str, x: Tensor, what: str) -> TensorizedImpl:
    """Return the implementation that `impl` means for x; see `full.select_impl`."""
    return TRITON_IMPL if use_kernels(impl, x, what) else TORCH_IMPL

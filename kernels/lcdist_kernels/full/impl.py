"""Implementations of softmax attention over one block of keys: tiled torch or kernels."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.full import kernel, tiled
from lcdist_kernels.triton_common import use_kernels


class AttentionImpl(NamedTuple):
    """`full_fwd` and `full_bwd` of one implementation; `tiled` describes their semantics."""

    fwd: Callable[..., tuple[Tensor, Tensor]]
    bwd: Callable[..., tuple[Tensor, Tensor, Tensor]]


TORCH_IMPL = AttentionImpl(tiled.full_fwd, tiled.full_bwd)
TRITON_IMPL = AttentionImpl(kernel.full_fwd, kernel.full_bwd)


def select_impl(impl: str, x: Tensor, what: str) -> AttentionImpl:
    """Return the implementation that `impl`, "auto", "triton" or "torch", means for x.

    x `[b, s, h, d]`: a tensor like the inputs. what: the operator's name in the log. Raises
    ValueError for "triton" where no kernel takes such tensors.
    """
    return TRITON_IMPL if use_kernels(impl, x, what) else TORCH_IMPL

"""Implementations of CoCA: its elementwise maps, and softmax attention over a block."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels import full
from lcdist_kernels.coca import transform, transform_kernel


class CoCAImpl(NamedTuple):
    """Softmax attention over q' and k', and the maps of `transform` that make these.

    The kernels' maps return q' and k' in the input's dtype, rounded once; torch's in a wide one.
    """

    block: full.AttentionImpl
    queries: Callable[..., Tensor]
    queries_bwd: Callable[..., Tensor]
    keys: Callable[..., Tensor]
    keys_bwd: Callable[..., Tensor]


TORCH_IMPL = CoCAImpl(
    full.TORCH_IMPL, transform.queries, transform.queries_bwd, transform.keys, transform.keys_bwd
)
TRITON_IMPL = CoCAImpl(
    full.TRITON_IMPL,
    transform_kernel.queries,
    transform_kernel.queries_bwd,
    transform_kernel.keys,
    transform_kernel.keys_bwd,
)


def select_coca_impl(impl: str, x: Tensor, what: str, packed: bool = False) -> CoCAImpl:
    """Return the implementation that `impl` means for x; see `full.select_block_impl`.

    A library computes the softmax alone; q' and k' are made by kernels before it.
    """
    block = full.select_block_impl(impl, x, what, packed)
    return TORCH_IMPL if block is full.TORCH_IMPL else TRITON_IMPL._replace(block=block)

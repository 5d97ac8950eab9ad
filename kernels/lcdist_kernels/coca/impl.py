"""Implementations of CoCA: its elementwise maps, and softmax attention over a block."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels import full
from lcdist_kernels.coca import transform, transform_kernel


class CoCAImpl(NamedTuple):
    """Softmax attention over q' and k', and the maps of `transform` that make these.

    The kernels' maps return q' and k' in the input's dtype, rounded once; torch's in a wide one.

    Attributes:
        block: softmax attention over a block.
        factors, factors_of_tau, factors_bwd: maps of queries and keys of the same tokens at once.
        queries, queries_bwd, keys, keys_bwd: maps of one of the two, for a ring.
    """

    block: full.AttentionImpl
    factors: Callable[..., tuple[Tensor, Tensor, Tensor]]
    factors_of_tau: Callable[..., tuple[Tensor, Tensor]]
    factors_bwd: Callable[..., tuple[Tensor, Tensor]]
    queries: Callable[..., Tensor]
    queries_bwd: Callable[..., Tensor]
    keys: Callable[..., Tensor]
    keys_bwd: Callable[..., Tensor]


def _impl_of(block: full.AttentionImpl, maps: ModuleType) -> CoCAImpl:
    """Return the implementation with the maps of a module."""
    return CoCAImpl(block, *(getattr(maps, name) for name in CoCAImpl._fields[1:]))


TORCH_IMPL = _impl_of(full.TORCH_IMPL, transform)
TRITON_IMPL = _impl_of(full.TRITON_IMPL, transform_kernel)


def select_coca_impl(impl: str, x: Tensor, what: str, packed: bool = False) -> CoCAImpl:
    """Return the implementation that `impl` means for x; see `full.select_block_impl`.

    A library computes the softmax alone; q' and k' are made by kernels before it.
    """
    block = full.select_block_impl(impl, x, what, packed)
    return TORCH_IMPL if block is full.TORCH_IMPL else TRITON_IMPL._replace(block=block)

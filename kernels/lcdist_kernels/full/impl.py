"""Implementations of softmax attention over one block of keys: tiled torch, kernels, libraries."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from lcdist_kernels.full import kernel, tiled
from lcdist_kernels.full.library_block import LibraryBlock, refuse_block
from lcdist_kernels.full.library_choice import FORCED, choose_library, force_library
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


def select_block_impl(impl: str, x: Tensor, what: str, packed: bool = False) -> AttentionImpl:
    """Return the same as `select_impl`, where whole and causal blocks may go to a library.

    "auto" takes the fastest library for x that is there and passes a self-test, with kernels for
    all other blocks; "cudnn", "fa3" and "fa4" take that library for every block.

    Args:
        impl, x, what: as in `select_impl`.
        packed: all blocks are of packed documents, so "auto" looks for no library.

    Raises:
        ValueError: no kernel, or not the library that was asked for, takes such tensors.
    """
    if impl in FORCED:
        refuse = refuse_block(impl)
        block = LibraryBlock(force_library(impl, x), refuse, refuse)
    else:
        library = choose_library(x, what) if impl == "auto" and not packed else None
        if library is None:
            return select_impl(impl, x, what)
        block = LibraryBlock(library, *TRITON_IMPL)
    return AttentionImpl(block.fwd, block.bwd)

"""Full causal attention: softmax over the earlier tokens of a query's own document."""

from lcdist_kernels.full.impl import (
    TORCH_IMPL,
    TRITON_IMPL,
    AttentionImpl,
    select_block_impl,
    select_impl,
)
from lcdist_kernels.full.library_choice import FORCED
from lcdist_kernels.full.op import IMPLS, full_attention
from lcdist_kernels.full.reference import full_partial, full_reference
from lcdist_kernels.full.tiled import full_bwd, full_fwd
from lcdist_kernels.partial import merge, reaches, visible

__all__ = [
    "FORCED",
    "IMPLS",
    "TRITON_IMPL",
    "TORCH_IMPL",
    "AttentionImpl",
    "select_block_impl",
    "select_impl",
    "full_attention",
    "full_bwd",
    "full_fwd",
    "full_partial",
    "full_reference",
    "merge",
    "reaches",
    "visible",
]

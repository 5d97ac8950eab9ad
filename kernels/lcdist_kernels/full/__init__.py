"""Full causal attention: softmax over every earlier token of a query's own document."""

from lcdist_kernels.full.impl import KERNEL, TILED, BlockOperator, block_operator
from lcdist_kernels.full.op import BUILT, full_attention
from lcdist_kernels.full.reference import full_partial, full_reference
from lcdist_kernels.full.tiled import full_bwd, full_fwd
from lcdist_kernels.partial import merge, reaches, visible

__all__ = [
    "BUILT",
    "KERNEL",
    "TILED",
    "BlockOperator",
    "block_operator",
    "full_attention",
    "full_bwd",
    "full_fwd",
    "full_partial",
    "full_reference",
    "merge",
    "reaches",
    "visible",
]

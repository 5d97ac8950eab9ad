"""RMSNorm of a residual stream: the sum and its norm forward, all gradients in one pass back."""

from lcdist_kernels.norm.op import add_norm, scale_rows
from lcdist_kernels.norm.reference import add_norm_reference

__all__ = ["add_norm", "add_norm_reference", "scale_rows"]

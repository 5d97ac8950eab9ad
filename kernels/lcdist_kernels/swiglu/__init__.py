"""SwiGLU of a gated MLP: one pass over gate and up each way."""

from lcdist_kernels.swiglu.op import swiglu, swiglu_gradient_
from lcdist_kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu", "swiglu_gradient_", "swiglu_reference"]

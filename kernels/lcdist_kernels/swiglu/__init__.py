"""SwiGLU of a gated MLP: one pass over gate and up each way."""

from lcdist_kernels.swiglu.op import swiglu
from lcdist_kernels.swiglu.reference import swiglu_reference

__all__ = ["swiglu", "swiglu_reference"]

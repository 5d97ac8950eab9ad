"""AdamW over many tensors in one pass, with clipping and a gate that the host does not wait for."""

from lcdist_kernels.adamw.op import IMPLS, adamw_
from lcdist_kernels.adamw.reference import adamw_reference
from lcdist_kernels.adamw.tensors import Hyper, Tensors

__all__ = ["IMPLS", "Hyper", "Tensors", "adamw_", "adamw_reference"]

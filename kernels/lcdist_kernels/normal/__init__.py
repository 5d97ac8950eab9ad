"""Normal numbers for a shard of a matrix, the same for every division of the matrix."""

from lcdist_kernels.normal.op import Shard, normal_
from lcdist_kernels.normal.reference import normal_reference

__all__ = ["Shard", "normal_", "normal_reference"]

"""Queries, keys and values out of the fused projection, rotated, in one pass over memory."""

from lcdist_kernels.qkv.op import split_qkv
from lcdist_kernels.qkv.reference import split_qkv_reference
from lcdist_kernels.qkv.shape import QkvShape

__all__ = ["QkvShape", "split_qkv", "split_qkv_reference"]

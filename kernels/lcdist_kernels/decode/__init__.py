"""Attention of single new tokens over a cache: split over keys, with a group's queries packed."""

from lcdist_kernels.decode.launch import decode_blocks, decode_fwd
from lcdist_kernels.decode.reference import decode_blocks_reference, decode_reference

__all__ = ["decode_blocks", "decode_blocks_reference", "decode_fwd", "decode_reference"]

"""The attention methods, each exact under context parallelism: `METHODS[name]` is one of them."""

from lcdist.attention.interface import (
    AttentionContext,
    AttentionMethod,
    DecodeCache,
    HeadSlice,
    Shape,
    Traffic,
)
from lcdist.attention.registry import METHODS

__all__ = [
    "METHODS",
    "AttentionContext",
    "AttentionMethod",
    "DecodeCache",
    "HeadSlice",
    "Shape",
    "Traffic",
]

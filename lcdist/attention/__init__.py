"""The attention methods, each exact under context parallelism: `METHODS[name]` is one of them."""

# The registry loads other packages' methods, which import these names from here: it comes last.
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

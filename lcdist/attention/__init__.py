"""The attention methods, each exact under context parallelism: `METHODS[name]` is one of them."""

from lcdist.attention.interface import AttentionMethod, HeadSlice, Shape, Traffic
from lcdist.attention.registry import METHODS

__all__ = ["METHODS", "AttentionMethod", "HeadSlice", "Shape", "Traffic"]

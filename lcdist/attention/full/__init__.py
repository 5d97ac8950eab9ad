"""Full causal attention, the method the others are compared with."""

from lcdist.attention.full.attention import METHOD

__all__ = ["METHOD"]

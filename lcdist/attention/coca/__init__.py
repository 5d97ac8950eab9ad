"""CoCA: collinear constrained attention (arXiv:2309.08646)."""

from lcdist.attention.coca.attention import METHOD

__all__ = ["METHOD"]

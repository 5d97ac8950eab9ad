"""Tensorized attention over a sequence that is factored into modes (arXiv:2410.20926)."""

from lcdist.attention.tensorized.attention import METHOD

__all__ = ["METHOD"]

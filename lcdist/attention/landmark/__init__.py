"""Landmark attention: blocks of keys gated by landmark tokens (arXiv:2305.16300)."""

from lcdist.attention.landmark.attention import METHOD

__all__ = ["METHOD"]

"""LSSA and LSSAR: length-scaled softplus attention (arXiv:2501.13428)."""

from lcdist.attention.lssar.attention import METHOD

__all__ = ["METHOD"]

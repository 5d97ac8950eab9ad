"""SCCA, SDA and LongMixed: shifted windows and dilated heads (arXiv:2312.07305)."""

from lcdist.attention.scca.attention import METHOD

__all__ = ["METHOD"]

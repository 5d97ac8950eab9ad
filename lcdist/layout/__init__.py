"""Layouts: which rank holds which token, and how documents are placed in a sequence."""

from lcdist.layout.context import KINDS, ContextLayout, pieces_needed

__all__ = ["KINDS", "ContextLayout", "pieces_needed"]

"""Layouts of tokens on context-parallel ranks, and of documents in a sequence."""

from lcdist.layout.context import KINDS, ContextLayout, pieces_needed

__all__ = ["KINDS", "ContextLayout", "pieces_needed"]

"""Inference: KV cache and text generation."""

from lcdist.inference.sampling import Sampling
from lcdist.inference.settings import Figures, Generation

__all__ = ["Figures", "Generation", "Sampling"]

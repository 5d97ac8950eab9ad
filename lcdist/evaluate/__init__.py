"""A trained model, read: perplexity by length, long-context tasks, continued texts."""

from lcdist.evaluate.continuation import Continued, generate_text
from lcdist.evaluate.evaluation import Kept, evaluate_checkpoint
from lcdist.evaluate.loaded_model import LoadedModel, load_model

__all__ = [
    "Continued",
    "Kept",
    "LoadedModel",
    "evaluate_checkpoint",
    "generate_text",
    "load_model",
]

"""lcdist: train language models on long sequences with exact context parallelism."""

__version__ = "0.1.0"

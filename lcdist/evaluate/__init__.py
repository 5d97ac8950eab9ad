"""Evaluation of a trained model: perplexity by length."""

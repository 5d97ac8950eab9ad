"""Inference: a cache of keys and values, and generation."""

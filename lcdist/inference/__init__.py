"""Inference: KV cache and text generation."""

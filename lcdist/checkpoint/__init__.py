"""Sharded checkpoints: read, write, and access tensor by tensor without a model."""

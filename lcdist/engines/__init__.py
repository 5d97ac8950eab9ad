"""Engines: hold parameters and optimizer state, run forward and backward passes."""

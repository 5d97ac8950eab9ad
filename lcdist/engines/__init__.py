"""Engines: own parameters and optimizer state, and run forward and backward passes."""

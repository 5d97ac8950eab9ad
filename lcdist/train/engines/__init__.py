"""Engines: ways to own parameters and optimizer state."""

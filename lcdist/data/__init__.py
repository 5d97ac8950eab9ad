"""Text to tokens, tokens to samples, samples to batches.

This package re-exports nothing: import each name from the file that defines it.
"""

"""Tokens: text to tokens to batches; every name is imported from the file that has it."""

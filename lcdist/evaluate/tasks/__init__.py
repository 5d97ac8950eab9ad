"""Synthetic tasks of long-context reading: what a prompt asks, how an answer is scored."""

"""Megatron-core seen from here: the model with our attention in its core-attention slot."""

"""Activation memory: recomputation, CPU offload and sequence-tiled MLPs."""

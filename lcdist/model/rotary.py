"""Rotary embedding from a scaling rule: the inverse frequencies theta_i of `[model.rope]`.

With D = head_dim and i = 0 .. D/2 - 1:

- none: theta_i = base^(-2 i / D) (RoFormer, arXiv:2104.09864)
- pi:   theta_i / factor (position interpolation, arXiv:2306.15595)
- ntk:  base replaced by base * factor^(D / (D - 2)), so that the first frequency stays and the
        last is divided by exactly `factor`
"""

import torch

from lcdist.config.schema import Rope, RopeNTK, RopePI
from lcdist_kernels import Rotary


def inverse_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """theta_i in radians per token, float64 `[head_dim / 2]`, on the CPU."""
    base = rope.base
    if isinstance(rope, RopeNTK):
        base *= rope.factor ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    theta = base**-exponents
    return theta / rope.factor if isinstance(rope, RopePI) else theta


def make_rotary(rope: Rope, head_dim: int) -> Rotary:
    """The rotation that every attention method applies to q and k from their positions."""
    return Rotary(inverse_frequencies(rope, head_dim))

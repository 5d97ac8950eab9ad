"""Rotary embedding from a scaling rule: the inverse frequencies theta_i of `[model.rope]`.

With D = head_dim, i = 0 .. D/2 - 1 and s = factor, L = original_seqlen:

- none:   theta_i = base^(-2 i / D) (RoFormer, arXiv:2104.09864); another base alone is ABF
          (arXiv:2309.16039)
- pi:     theta_i / s (position interpolation, arXiv:2306.15595)
- ntk:    base replaced by base * s^(D / (D - 2)), so that the first frequency stays and the last is
          divided by exactly s
- yarn:   (1 - r_i) theta_i + r_i theta_i / s (arXiv:2309.00071). The ramp r_i rises from 0 to 1
          between the features that rotate beta_fast and beta_slow times over L tokens, linear in i
          as in the authors' code, not in the number of rotations. cos and sin times 0.1 ln s + 1
- llama3: (1 - u_i) theta_i / s + u_i theta_i, u_i rising from 0 to 1 as L theta_i / 2 pi goes from
          low_freq_factor to high_freq_factor (Llama 3.1's published configuration)
"""

import math

import torch
from torch import Tensor

from lcdist.config.rope import Rope, RopeLlama3, RopeNTK, RopePI, RopeYarn
from lcdist_kernels import Rotary


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """theta_i in radians per token, float64 `[head_dim / 2]`, on the CPU."""
    base = rope.base
    if isinstance(rope, RopeNTK):
        base *= rope.factor ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    theta = base**-exponents
    if isinstance(rope, RopePI):
        return theta / rope.factor
    if isinstance(rope, RopeYarn):
        ramp = _yarn_ramp(rope, head_dim)
        return theta * (1 - ramp) + theta / rope.factor * ramp
    if isinstance(rope, RopeLlama3):
        turns = rope.original_seqlen * theta / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return theta / rope.factor * (1 - kept) + theta * kept
    return theta


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by; logits are by its square."""
    if not isinstance(rope, RopeYarn):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0


def make_rotary(rope: Rope, head_dim: int) -> Rotary:
    """The rotation that every attention method applies to q and k from their positions."""
    return Rotary(inverse_frequencies(rope, head_dim), attention_factor(rope))


def _yarn_ramp(rope: RopeYarn, head_dim: int) -> Tensor:
    def feature(rotations: float) -> float:
        """The (fractional) number of the feature that rotates so often over the original length."""
        wavelength = rope.original_seqlen / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.base))

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        # As in the authors' code: a step, not a division by zero.
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)

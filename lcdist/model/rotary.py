"""Rotary frequencies: inverse frequencies theta_i for each scaling rule of `[model.rope]`.

With D = head_dim, i = 0 .. D/2 - 1 and s = factor, L = original_seqlen:

- none:   theta_i = base^(-2 i / D) (RoFormer, arXiv:2104.09864); with a larger base this is ABF
          (arXiv:2309.16039)
- pi:     theta_i / s (position interpolation, arXiv:2306.15595)
- ntk:    base replaced by base * s^(D / (D - 2)), so that the first frequency stays and the last is
          divided by exactly s
- yarn:   (1 - r_i) theta_i + r_i theta_i / s (arXiv:2309.00071). The ramp r_i rises from 0 to 1
          between the features that rotate beta_fast and beta_slow times over L tokens. It is linear
          in i, as in the authors' code, not in the number of rotations. cos and sin are multiplied
          by 0.1 ln s + 1
- llama3: (1 - u_i) theta_i / s + u_i theta_i, u_i rising from 0 to 1 as L theta_i / 2 pi goes from
          low_freq_factor to high_freq_factor (Llama 3.1's published configuration)
- dynamic: base * (s n / L - (s - 1))^(D / (D - 2)) for a sequence of n > L tokens (dynamic NTK, as
          in transformers); theta_i for up to L tokens
- longrope: theta_i / short_i for sequences of at most L tokens and theta_i / long_i for longer ones
          (LongRoPE, arXiv:2402.13753). cos and sin are multiplied by sqrt(1 + ln s / ln L)

The last two depend on the sequence length n. In training and evaluation, n is the whole sequence;
in generation, n is the number of tokens read so far.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lcdist.config.rope import (
    Rope,
    RopeDynamic,
    RopeLlama3,
    RopeLong,
    RopeNTK,
    RopePI,
    RopeYarn,
)
from lcdist_kernels import Rotary


def inverse_frequencies(rope: Rope, head_dim: int, seqlen: int = 1) -> Tensor:
    """Return theta_i in radians per token, float64 `[head_dim / 2]`, on the CPU.

    seqlen: tokens of the sequence; only dynamic and longrope depend on it.
    """
    base = rope.base * _base_scale(rope, seqlen) ** (head_dim / (head_dim - 2))
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
    if isinstance(rope, RopeLong):
        extended = seqlen > rope.original_seqlen
        divisors = rope.long_factors if extended else rope.short_factors
        return theta / torch.tensor(divisors, dtype=torch.float64)
    return theta


def attention_factor(rope: Rope) -> float:
    """Return the factor of cos and sin; logits are scaled by its square."""
    if not isinstance(rope, RopeYarn | RopeLong):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if isinstance(rope, RopeLong):
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_seqlen))
    return 0.1 * math.log(rope.factor) + 1.0


def make_rotary(rope: Rope, head_dim: int, seqlen: int = 1) -> Rotary:
    """Build the rotation that attention methods apply to q and k by their positions.

    seqlen: as for `inverse_frequencies`.
    """
    return Rotary(inverse_frequencies(rope, head_dim, seqlen), attention_factor(rope))


def rotary_by_length(rope: Rope, head_dim: int) -> Callable[[int], Rotary]:
    """Return a function from a sequence length in tokens to its rotation.

    Lengths with the same frequencies get the same object.
    """
    # All layers ask for the same few lengths.
    cached = lru_cache(maxsize=8)(lambda seqlen: make_rotary(rope, head_dim, seqlen))
    if isinstance(rope, RopeDynamic):
        return lambda seqlen: cached(max(seqlen, rope.original_seqlen))
    if isinstance(rope, RopeLong):
        return lambda seqlen: cached(rope.original_seqlen + (seqlen > rope.original_seqlen))
    return lambda seqlen: cached(1)


def _base_scale(rope: Rope, seqlen: int) -> float:
    """Return the base's multiplier before the power D / (D - 2); 1.0 if the base stays."""
    if isinstance(rope, RopeNTK):
        return rope.factor
    if isinstance(rope, RopeDynamic) and seqlen > rope.original_seqlen:
        return rope.factor * seqlen / rope.original_seqlen - (rope.factor - 1)
    return 1.0


def _yarn_ramp(rope: RopeYarn, head_dim: int) -> Tensor:
    def feature(rotations: float) -> float:
        """Return the (fractional) index of the feature that rotates so often over L tokens."""
        wavelength = rope.original_seqlen / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.base))

    low, high = feature(rope.beta_fast), feature(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        # As in the authors' code: a step instead of a division by zero.
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)

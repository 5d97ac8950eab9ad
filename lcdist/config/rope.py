"""Configuration of rotary embedding: a union with the tag `scaling`.

`lcdist.model.rotary` computes the frequencies.
"""

from dataclasses import dataclass, field
from typing import Literal

from lcdist.config.fields import FACTOR, ROPE_BASE, SEQLEN, above, at_least, required


@dataclass(frozen=True, kw_only=True)
class RopePlain:
    """Unscaled rotary embedding: frequencies base^(-2i/d) (arXiv:2104.09864)."""

    scaling: Literal["none"] = "none"
    base: float = above(1, 10000.0, ROPE_BASE)  # of the frequencies


@dataclass(frozen=True, kw_only=True)
class RopePI:
    """Position interpolation: every frequency divided by `factor` (arXiv:2306.15595)."""

    scaling: Literal["pi"] = "pi"
    base: float = above(1, 10000.0, ROPE_BASE)  # of the frequencies
    factor: float = at_least(1, 1.0, FACTOR)  # times as long a context


@dataclass(frozen=True, kw_only=True)
class RopeNTK:
    """NTK-aware scaling: base multiplied by factor^(d/(d-2))."""

    scaling: Literal["ntk"] = "ntk"
    base: float = above(1, 10000.0, ROPE_BASE)  # of the frequencies
    factor: float = at_least(1, 1.0, FACTOR)  # times as long a context


@dataclass(frozen=True, kw_only=True)
class RopeYarn:
    """YaRN (arXiv:2309.00071): interpolate slow features, keep fast ones, with a ramp between.

    Attributes:
        factor: How many times original_seqlen the model is extended to.
        original_seqlen: Training length of the model, in tokens.
        beta_fast: Rotations over original_seqlen where the ramp begins.
        beta_slow: Rotations over original_seqlen where the ramp ends.
        attention_factor: Multiplies cos and sin; None: 0.1 ln factor + 1.
        truncate: Whether the ramp's ends are rounded to whole features.
    """

    scaling: Literal["yarn"] = "yarn"
    base: float = above(1, 10000.0, ROPE_BASE)  # of the frequencies
    factor: float = at_least(1, 1.0, FACTOR)
    original_seqlen: int = required(1, SEQLEN)
    beta_fast: float = above(0, 32.0, FACTOR)
    beta_slow: float = above(0, 1.0, FACTOR)
    attention_factor: float | None = above(0, None, FACTOR)
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class RopeLlama3:
    """Llama 3.1's rule: interpolate long wavelengths, keep short ones, blend between.

    Attributes:
        factor: Divides the frequencies of wavelengths beyond original_seqlen / low_freq_factor.
        low_freq_factor: Bound of the long wavelengths.
        high_freq_factor: Wavelengths below original_seqlen / high_freq_factor are kept.
        original_seqlen: Training length of the model, in tokens.
    """

    scaling: Literal["llama3"] = "llama3"
    base: float = above(1, 500000.0, ROPE_BASE)  # of the frequencies
    factor: float = at_least(1, 8.0, FACTOR)
    low_freq_factor: float = above(0, 1.0, FACTOR)
    high_freq_factor: float = above(0, 4.0, FACTOR)
    original_seqlen: int = at_least(1, 8192, SEQLEN)


@dataclass(frozen=True, kw_only=True)
class RopeDynamic:
    """Dynamic NTK: NTK-aware scaling that grows with the length of the sequence.

    Sequences of up to original_seqlen tokens are not scaled. For s tokens, base is multiplied by
    (factor s / original_seqlen - (factor - 1))^(d/(d-2)).
    """

    scaling: Literal["dynamic"] = "dynamic"
    base: float = above(1, 10000.0, ROPE_BASE)  # of the frequencies
    factor: float = at_least(1, 1.0, FACTOR)  # times as long a context
    original_seqlen: int = required(1, SEQLEN)  # training length of the model, in tokens


@dataclass(frozen=True, kw_only=True)
class RopeLong:
    """LongRoPE (arXiv:2402.13753): every frequency divided by its own factor, found by search.

    Attributes:
        factor: How many times original_seqlen the model is extended to.
        original_seqlen: Training length of the model, in tokens.
        short_factors: head_dim / 2 divisors, for sequences of at most original_seqlen tokens.
        long_factors: head_dim / 2 divisors, for longer sequences.
        attention_factor: Multiplies cos and sin; None: sqrt(1 + ln factor / ln original_seqlen).
    """

    scaling: Literal["longrope"] = "longrope"
    base: float = above(1, 10000.0, ROPE_BASE)  # of the frequencies
    factor: float = at_least(1, 1.0, FACTOR)
    original_seqlen: int = required(2, SEQLEN)
    short_factors: tuple[float, ...] = field(metadata={"above": 0, "limit": FACTOR})
    long_factors: tuple[float, ...] = field(metadata={"above": 0, "limit": FACTOR})
    attention_factor: float | None = above(0, None, FACTOR)


Rope = RopePlain | RopePI | RopeNTK | RopeYarn | RopeLlama3 | RopeDynamic | RopeLong

"""Rotary embedding in a configuration: a union, told apart by `scaling`.

The frequencies that follow from it are made by `lcdist.model.rotary`.
"""

from dataclasses import dataclass, field
from typing import Literal

from lcdist.config.fields import above, at_least, required


@dataclass(frozen=True, kw_only=True)
class RopePlain:
    """Rotary embedding as trained: frequencies base^(-2i/d) (arXiv:2104.09864)."""

    scaling: Literal["none"] = "none"
    base: float = above(1, 10000.0)


@dataclass(frozen=True, kw_only=True)
class RopePI:
    """Position interpolation: every frequency divided by `factor` (arXiv:2306.15595)."""

    scaling: Literal["pi"] = "pi"
    base: float = above(1, 10000.0)
    factor: float = at_least(1, 1.0)


@dataclass(frozen=True, kw_only=True)
class RopeNTK:
    """NTK-aware scaling: base multiplied by factor^(d/(d-2))."""

    scaling: Literal["ntk"] = "ntk"
    base: float = above(1, 10000.0)
    factor: float = at_least(1, 1.0)


@dataclass(frozen=True, kw_only=True)
class RopeYarn:
    """YaRN (arXiv:2309.00071): slow features interpolated, fast ones kept, a ramp between.

    original_seqlen: what the model was trained on, in tokens. beta_fast, beta_slow: rotations over
    it where the ramp begins and ends. attention_factor: multiplies cos and sin; None: 0.1 ln factor
    + 1. truncate: whether the ramp's ends are rounded to whole features.
    """

    scaling: Literal["yarn"] = "yarn"
    base: float = above(1, 10000.0)
    factor: float = at_least(1, 1.0)
    original_seqlen: int = required(1)
    beta_fast: float = above(0, 32.0)
    beta_slow: float = above(0, 1.0)
    attention_factor: float | None = above(0, None)
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class RopeLlama3:
    """Llama 3.1's rule: wavelengths beyond original_seqlen / low_freq_factor divided by `factor`.

    Those below original_seqlen / high_freq_factor are kept, and blended between.
    """

    scaling: Literal["llama3"] = "llama3"
    base: float = above(1, 500000.0)
    factor: float = at_least(1, 8.0)
    low_freq_factor: float = above(0, 1.0)
    high_freq_factor: float = above(0, 4.0)
    original_seqlen: int = at_least(1, 8192)


@dataclass(frozen=True, kw_only=True)
class RopeDynamic:
    """Dynamic NTK: NTK-aware scaling that grows with the length of the sequence that is read.

    Up to original_seqlen tokens nothing is scaled; at s of them, base is multiplied by
    (factor s / original_seqlen - (factor - 1))^(d/(d-2)).
    """

    scaling: Literal["dynamic"] = "dynamic"
    base: float = above(1, 10000.0)
    factor: float = at_least(1, 1.0)
    original_seqlen: int = required(1)


@dataclass(frozen=True, kw_only=True)
class RopeLong:
    """LongRoPE (arXiv:2402.13753): every frequency divided by a searched number of its own.

    short_factors, long_factors: these numbers, head_dim / 2 of them, for sequences of at most
    original_seqlen tokens and for longer ones. factor: how many times original_seqlen the model is
    extended to. attention_factor: multiplies cos and sin; None: sqrt(1 + ln factor / ln
    original_seqlen).
    """

    scaling: Literal["longrope"] = "longrope"
    base: float = above(1, 10000.0)
    factor: float = at_least(1, 1.0)
    original_seqlen: int = required(2)
    short_factors: tuple[float, ...] = field(metadata={"above": 0})
    long_factors: tuple[float, ...] = field(metadata={"above": 0})
    attention_factor: float | None = above(0, None)


Rope = RopePlain | RopePI | RopeNTK | RopeYarn | RopeLlama3 | RopeDynamic | RopeLong

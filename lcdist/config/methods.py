"""Options of the attention methods: keys of the section `[attention]`. Lengths are in tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lcdist.config.fields import DILATION, POWER, SEQLEN, SMALL, at_least


@dataclass(frozen=True, kw_only=True)
class FullOptions:
    """Full causal attention (arXiv:1706.03762).

    Attributes:
        length_scale: Length-scaled softmax (arXiv:2202.12172): scores of a query that sees n tokens
            of its document are multiplied by ln(n) / ln(length_scale). A model trained at so many
            tokens has the usual scores at its greatest length. None: not scaled.
    """

    length_scale: int | None = at_least(2, None, SEQLEN)


@dataclass(frozen=True, kw_only=True)
class CocaOptions:
    """Collinear constrained attention (arXiv:2309.08646).

    Attributes:
        variant: slack: equation 10 of the paper without its constraint on q. strict: equation 17.
    """

    variant: Literal["slack", "strict"] = "slack"


@dataclass(frozen=True, kw_only=True)
class SccaOptions:
    """Shifted cross chunk attention and its relatives (arXiv:2312.07305); lengths in tokens.

    Attributes:
        pattern: Which keys the heads see. fixed: their own chunk, and for half of the heads a chunk
            shifted by `shift`. flow: a chunk that is shifted further from head to head. sda,
            sda_key: every `dilation`-th distance, or key. longmixed: some heads as fixed, some as
            sda of dilation 2, some of 4. s2: shifted chunks of LongLoRA (arXiv:2309.12307).
        chunk_size: Tokens of a chunk.
        shift: Distance of the shifted units, for `fixed` and `longmixed` only; None: half a chunk.
        wrap: Keys of a shifted unit's first chunks: none (`mask`), or the chunk at a shorter
            distance (`fold`). None: `fold` for `flow`, else `mask`.
        dilation: Of `sda` and `sda_key`.
        fractions: Fractions of the heads for each unit of `longmixed`.
        stagger: Added to the number of a head that its shift or first key follows from, for `flow`,
            `sda` and `sda_key`.
    """

    pattern: Literal["fixed", "flow", "sda", "sda_key", "longmixed", "s2"] = "fixed"
    chunk_size: int = at_least(1, 2048, SEQLEN)
    shift: int | None = at_least(0, None, SEQLEN)
    wrap: Literal["mask", "fold"] | None = None
    dilation: int = at_least(1, 2, DILATION)
    fractions: tuple[float, ...] = at_least(0, (0.5, 0.25, 0.25), SMALL)
    stagger: int = at_least(0, 0, SEQLEN)


@dataclass(frozen=True, kw_only=True)
class TensorizedOptions:
    """Tensorized attention, lexicographic (arXiv:2410.20926); modes in tokens, finest first.

    The coarsest mode is not listed: it grows with the sequence. An empty list is full attention.

    Attributes:
        modes: Tokens of each mode but the coarsest.
        local_blocks: Blocks of the finest mode that a token sees as in full attention.
        pe: Positions that rotate a mode's queries and keys: their places in the mode, or in the
            text (`global`).
        hop_heads: Heads of the rows that stand for whole blocks: one for each query head, or the
            mean of those that share a key head. auto: q for groups of at most two.
    """

    modes: tuple[int, ...] = at_least(1, (512,), SEQLEN)
    local_blocks: int = at_least(1, 2, SEQLEN)
    pe: Literal["mode", "global"] = "mode"
    hop_heads: Literal["auto", "q", "kv"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LandmarkOptions:
    """Landmark attention (arXiv:2305.16300); lengths in tokens, landmarks included.

    Attributes:
        block_size: Tokens of a block; the last one is its landmark.
        top_k: Past blocks that a unit of select_tokens tokens attends to; None: all of them.
        select_tokens: Tokens that choose their blocks together; 1: causal token by token.
    """

    block_size: int = at_least(2, 64, SEQLEN)
    top_k: int | None = at_least(1, None, SEQLEN)
    select_tokens: int = at_least(1, 4096, SEQLEN)


@dataclass(frozen=True, kw_only=True)
class LssarOptions:
    """Length-scaled softplus attention with re-weighting (LSSAR); without `reweight`, LSSA.

    Attributes:
        power: Of a score above the mean of its row.
        reweight: Whether scores are compared with the mean of their row.
        exempt_rows: First rows of a document whose mean counts as 0.
    """

    power: float = at_least(1, 15.0, POWER)  # below 1, gradients are unbounded at a row's mean
    reweight: bool = True
    exempt_rows: int = at_least(0, 3, SEQLEN)


OPTIONS: Mapping[str, type] = {
    "full": FullOptions,
    "coca": CocaOptions,
    "scca": SccaOptions,
    "tensorized": TensorizedOptions,
    "landmark": LandmarkOptions,
    "lssar": LssarOptions,
}


@dataclass(frozen=True, kw_only=True)
class RawOptions:
    """Options of a method from another package, unchecked until the method is known."""

    table: Mapping[str, Any]

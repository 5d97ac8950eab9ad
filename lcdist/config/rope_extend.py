"""Work out `model.rope.extend`, a rule and a number, from a model's own rotation.

`RULE:FACTOR` makes the context FACTOR times as long: pi (arXiv:2306.15595), ntk, yarn
(arXiv:2309.00071) or llama3. A model that is scaled already keeps its rule, and its factor is
multiplied. `base:BASE` sets another base, as ProLong does (arXiv:2410.02660).
"""

import math
from collections.abc import Callable
from dataclasses import replace

from lcdist.config.fields import FACTOR, ROPE_BASE
from lcdist.config.rope import Rope, RopeLlama3, RopeLong, RopeNTK, RopePI, RopePlain, RopeYarn

_NEW: dict[str, Callable[[float, float, int], Rope]] = {
    "pi": lambda base, factor, seqlen: RopePI(base=base, factor=factor),
    "ntk": lambda base, factor, seqlen: RopeNTK(base=base, factor=factor),
    "yarn": lambda base, factor, seqlen: RopeYarn(base=base, factor=factor, original_seqlen=seqlen),
    "llama3": lambda base, factor, seqlen: RopeLlama3(
        base=base, factor=factor, original_seqlen=seqlen
    ),
}
_LEGAL = "pi:4, ntk:4, yarn:4, llama3:4 (context four times as long) or base:8e6"


def extend_rope(rope: Rope, seqlen: int, word: str) -> Rope:
    """Return the rotation that `word` makes of a model's.

    Args:
        rope: The model's rotation.
        seqlen: Context that the model was trained for, in tokens.
        word: RULE:FACTOR or base:BASE.

    Raises:
        ValueError: If the word is not legal, or the rule does not follow from the model's.
    """
    rule, number = _parts(word)
    if rule == "base":
        if not isinstance(rope, RopePlain):
            raise ValueError(f"the model's rotation is scaled by {rope.scaling}: extend that rule")
        return replace(rope, base=number)
    if isinstance(rope, RopePlain) and rule in _NEW:
        return _NEW[rule](rope.base, number, seqlen)
    if isinstance(rope, RopeLong) or rule == "longrope":
        raise ValueError(
            "LongRoPE's factors are searched for one length: write [model.rope] with "
            'scaling = "longrope", factor, original_seqlen, short_factors and long_factors'
        )
    if rope.scaling != rule or rule not in _NEW:
        raise ValueError(
            f"the model's rotation is scaled by {rope.scaling}, and only {rope.scaling}:FACTOR "
            "follows from it"
        )
    assert isinstance(rope, RopePI | RopeNTK | RopeYarn | RopeLlama3)
    return with_factor(rope, rope.factor * number)


def with_factor(rope: RopePI | RopeNTK | RopeYarn | RopeLlama3, factor: float) -> Rope:
    """Return a rotation with another factor, and YaRN's attention factor by its formula.

    One that was chosen freely is kept.
    """
    if isinstance(rope, RopeYarn):
        written = rope.attention_factor
        by_formula = written is None or math.isclose(
            written, 0.1 * math.log(rope.factor) + 1, rel_tol=1e-6
        )
        return replace(rope, factor=factor, attention_factor=None if by_formula else written)
    return replace(rope, factor=factor)


def base_of(word: str) -> float | None:
    """Return BASE of `base:BASE`; None for another rule. Raises ValueError as `extend_rope`."""
    rule, number = _parts(word)
    return number if rule == "base" else None


def _parts(word: str) -> tuple[str, float]:
    """Return rule and number of a word; raise ValueError if it is not legal."""
    rule, colon, text = word.partition(":") if isinstance(word, str) else ("", "", "")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not colon or rule not in {*_NEW, "longrope", "base"} or not math.isfinite(number):
        raise ValueError(f"must be {_LEGAL}")
    low, high = (1.0, ROPE_BASE.most) if rule == "base" else (1.0, FACTOR.most)
    if not low <= number <= high or (rule == "base" and number == low):
        raise ValueError(f"the number must be from {low:g} to {high:g}")
    return rule, number

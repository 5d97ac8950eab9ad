"""Confidence intervals of 95 %, without drawing anything at random."""

import math
from collections.abc import Sequence
from statistics import NormalDist

LEVEL = 0.95


def finite(value: float) -> float | None:
    """Return a number that JSON can hold: None for NaN and infinity."""
    return value if math.isfinite(value) else None


def perplexity_of(loss: float) -> float:
    """Return exp(loss), with the loss limited to 700 so that it does not overflow.

    NaN for a loss that is not finite.
    """
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan


def exp_interval(interval: Sequence[float] | None) -> list[float] | None:
    """Return the interval of a perplexity from that of the loss."""
    return None if interval is None else [perplexity_of(end) for end in interval]


def mean_interval(
    weights: Sequence[float], totals: Sequence[float]
) -> tuple[float, list[float] | None]:
    """Return sum(totals) / sum(weights) and the interval of this ratio.

    The pieces are taken for independent; pieces without weight are left out. The standard error is
    that of a ratio of means, the factor Student's t for one degree of freedom less than pieces.

    Args:
        weights: of each piece, such as its number of scored tokens.
        totals: of each piece, such as its nats.

    Returns:
        The ratio, NaN without weight; and its interval, None for fewer than two pieces or numbers
        that are not finite.
    """
    pieces = [(w, x) for w, x in zip(weights, totals, strict=True) if w]
    weight, total = math.fsum(w for w, _ in pieces), _sum([x for _, x in pieces])
    ratio = total / weight if weight else math.nan
    count = len(pieces)
    if count < 2 or not math.isfinite(ratio):
        return ratio, None
    squares = math.fsum((x - ratio * w) ** 2 for w, x in pieces)
    error = math.sqrt(count / (count - 1) * squares) / weight
    half = student_t(count - 1) * error
    return ratio, [ratio - half, ratio + half]


def fraction_interval(successes: float, count: int) -> list[float] | None:
    """Return the interval of a fraction after Wilson (1927); None without cases.

    Cases that are half right and the like count as much. Then the interval is wider than need be:
    at the same mean, shares vary less than right and wrong.
    """
    if not count:
        return None
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, shrink = successes / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    # At the ends the formula is exact but for rounding.
    return [0.0 if not successes else low, 1.0 if successes == count else high]


def student_t(degrees: int) -> float:
    """Return the t that |T| stays below with a probability of 95 %, T of Student's distribution."""
    if degrees > 10_000:
        return NormalDist().inv_cdf((1 + LEVEL) / 2)
    low, high = 0.0, 100.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < LEVEL else (low, middle)
    return low


def _within(t: float, degrees: int) -> float:
    """Return the probability of |T| < t: finite sums, Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    cos2 = math.cos(angle) ** 2
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cos2 * (k - 1) / k
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def _sum(values: Sequence[float]) -> float:
    """Return the exact sum; what is not finite makes it so, and does not raise."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)

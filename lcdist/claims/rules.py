"""Rules of the claims: pure functions of what was measured.

No rule answers "reproduced" unless every model that it compares has converged, and the interval of
the ratio that it asks for lies on one side of the bound.
"""

import math
from collections.abc import Sequence

from lcdist.claims.claim import Figure, Measured, Rule, Verdict
from lcdist.utils.intervals import exp_interval, mean_interval

# A reading, and a multiple of the training length.
Where = tuple[str, int]

# A model has converged if its perplexity at its training length is at most this share of that of a
# model which knows the frequencies of tokens alone,
OF_UNIGRAM = 1 / 4
# and at most this many times that of the best model of the profile, read as it was trained.
OF_BEST = 1.25
# For claims about passkeys it also finds this share of them at the training length.
FINDS = 0.8
# Perplexity beyond the training length, as a multiple of that at the training length.
DIVERGES, STEADY = 10.0, 1.15


def unconverged(measured: Measured, names: Sequence[str], finds: bool = False) -> list[str]:
    """Return why models have not converged, one phrase for each that has not.

    Args:
        measured: all readings.
        names: of the readings that are to be compared.
        finds: whether passkeys have to be found at the training length.
    """
    length = measured.length
    known = [
        r.perplexity[length].value for r in measured.readings.values() if length in r.perplexity
    ]
    found = []
    for name in names:
        reading = measured.readings[name]
        own = reading.perplexity.get(length)
        if own is None:
            found.append(f"{name} has no finite perplexity at {length} tokens")
        elif own.value > OF_UNIGRAM * measured.unigram:
            least = OF_UNIGRAM * measured.unigram
            found.append(f"{name} has not converged: perplexity {own.value:.1f}, above {least:.1f}")
        elif own.value > OF_BEST * min(known):
            best = min(known)
            found.append(f"{name} has not converged: perplexity {own.value:.1f}, best {best:.1f}")
        elif finds and (at := reading.passkey.get(length)) is not None and at.value < FINDS:
            found.append(f"{name} finds {at.value:.0%} of the passkeys at {length} tokens")
        elif finds and length not in reading.passkey:
            found.append(f"{name} was not asked for passkeys at {length} tokens")
    return found


def not_extended(measured: Measured, name: str, start: str, times: int) -> list[str]:
    """Return why an extension has not converged: it is not better than the model it began from.

    Args:
        measured: all readings.
        name: of the extended model's reading.
        start: of the reading of the model that was extended.
        times: multiple of the training length that it was extended to.
    """
    found = ratio(measured, [(name, times)], [(start, times)])
    if found.high < 1:
        return []
    why = f"{name} has not converged: perplexity at {times}x is {_times(found)} that of {start}"
    return [f"{why}, which was not extended"]


def ratio(measured: Measured, above: Sequence[Where], below: Sequence[Where]) -> Figure:
    """Return a quotient of perplexities, with the interval of readings that share a text.

    Both meet the same easy and hard pieces of it, so that a quotient is far more certain than each
    perplexity.

    Args:
        measured: all readings.
        above: readings whose perplexities are multiplied, each with a multiple of the training
            length.
        below: those that the product is divided by.

    Returns:
        The quotient; infinite if a perplexity above is not finite, NaN if one below is not.
    """
    signed = [(1, *where) for where in above] + [(-1, *where) for where in below]
    tokens, nats = list[int](), list[float]()
    for sign, name, times in signed:
        pieces = measured.readings[name].pieces.get(times * measured.length)
        if pieces is None:
            return Figure(math.inf if sign > 0 else math.nan)
        tokens = tokens or [count for count, _ in pieces]
        nats = nats or [0.0] * len(tokens)
        if [count for count, _ in pieces] != tokens:
            raise ValueError(f"{name} was read on other text than {signed[0][1]}")
        nats = [total + sign * own for total, (_, own) in zip(nats, pieces, strict=True)]
    mean, interval = mean_interval(tokens, nats)
    ends = exp_interval(interval)
    return Figure(math.exp(mean), (ends[0], ends[1]) if ends else None)


def growth(measured: Measured, name: str, times: int) -> Figure:
    """Return perplexity at `times` the training length over that at the training length."""
    return ratio(measured, [(name, times)], [(name, 1)])


def steady_where_other_diverges(name: str, other: str, times: int, bound: float) -> Rule:
    """Return the rule: `name` grows by at most `bound` where `other` diverges."""

    def rule(measured: Measured) -> Verdict:
        problems = unconverged(measured, [name, other])
        if problems:
            return Verdict("not decided", "; ".join(problems))
        own, its = growth(measured, name, times), growth(measured, other, times)
        why = f"perplexity at {times}x is {_times(own)} that at 1x; {other}: {_times(its)}"
        if its.high < DIVERGES:
            return Verdict("not decided", f"{why}; {other} does not diverge at this size")
        if own.low > bound:
            return Verdict("not reproduced", why)
        if own.high <= bound and its.low >= DIVERGES:
            return Verdict("reproduced", why)
        return Verdict("not decided", f"{why}; the intervals include the bound")

    return rule


def steady(name: str, times: int, bound: float = STEADY) -> Rule:
    """Return the rule: perplexity at `times` the training length grows by at most `bound`."""

    def rule(measured: Measured) -> Verdict:
        problems = unconverged(measured, [name])
        if problems:
            return Verdict("not decided", "; ".join(problems))
        own = growth(measured, name, times)
        why = f"perplexity at {times}x is {_times(own)} that at 1x (bound {bound:g})"
        return _bounded(own, bound, why)

    return rule


def grows_less(name: str, other: str, times: int) -> Rule:
    """Return the rule: perplexity of `name` grows less to `times` the length than of `other`."""

    def rule(measured: Measured) -> Verdict:
        problems = unconverged(measured, [name, other])
        if problems:
            return Verdict("not decided", "; ".join(problems))
        own, its = growth(measured, name, times), growth(measured, other, times)
        why = f"perplexity at {times}x over that at 1x: {name} {_times(own)}, {other} {_times(its)}"
        both_ends = [(name, times), (other, 1)], [(other, times), (name, 1)]
        return _bounded(ratio(measured, *both_ends), 1.0, why)

    return rule


def lower(name: str, other: str, times: int, converge: Sequence[str] = (), start: str = "") -> Rule:
    """Return the rule: perplexity of `name` is lower at `times` the training length.

    Args:
        name: of the reading that the claim is about.
        other: of the one that it is compared with.
        times: multiple of the training length.
        converge: readings that have to have converged at the training length; default: both.
        start: the model that both were extended from to this length. Then it has to have converged,
            and `other` to be an improvement on it.
    """

    def rule(measured: Measured) -> Verdict:
        problems = unconverged(measured, converge or ([start] if start else [name, other]))
        problems += not_extended(measured, other, start, times) if start else []
        if problems:
            return Verdict("not decided", "; ".join(problems))
        length = times * measured.length
        pair = [measured.readings[each].perplexity.get(length) for each in (name, other)]
        if pair[0] is None or pair[1] is None:
            return Verdict("not decided", f"a perplexity at {length} tokens is not finite")
        own = ratio(measured, [(name, times)], [(other, times)])
        why = f"perplexity at {length} tokens: {name} {pair[0].value:.2f}, {other} "
        why += f"{pair[1].value:.2f}, {_times(own)}"
        return _bounded(own, 1.0, why)

    return rule


def as_good(name: str, other: str, times: int, within: float, start: str = "") -> Rule:
    """Return the rule: perplexity at `times` the length is at most `within` times the other's.

    start: as in `lower`.
    """

    def rule(measured: Measured) -> Verdict:
        problems = unconverged(measured, [start or other])
        problems += not_extended(measured, other, start, times) if start else []
        if problems:
            return Verdict("not decided", "; ".join(problems))
        length = times * measured.length
        pair = [measured.readings[each].perplexity.get(length) for each in (name, other)]
        if pair[0] is None or pair[1] is None:
            return Verdict("not decided", f"a perplexity at {length} tokens is not finite")
        own = ratio(measured, [(name, times)], [(other, times)])
        why = f"perplexity at {length} tokens is {_times(own)} that of {other} (bound {within:g})"
        return _bounded(own, within, why)

    return rule


def finds_more(name: str, other: str, lengths: Sequence[int]) -> Rule:
    """Return the rule: `name` finds more passkeys than `other` beyond the training length.

    At some multiple of the training length in `lengths` its interval lies above, at none below.
    """

    def rule(measured: Measured) -> Verdict:
        problems = unconverged(measured, [name, other], finds=True)
        if problems:
            return Verdict("not decided", "; ".join(problems))
        own, its = (measured.readings[each].passkey for each in (name, other))
        asked = [t * measured.length for t in lengths if t * measured.length in own]
        asked = [length for length in asked if length in its]
        told = [
            f"{length}: {own[length].value:.0%} and {its[length].value:.0%}" for length in asked
        ]
        why = f"passkeys found by {name} and {other} at {', '.join(told) or 'no length'}"
        if any(own[length].high < its[length].low for length in asked):
            return Verdict("not reproduced", why)
        if any(own[length].low > its[length].high for length in asked):
            return Verdict("reproduced", why)
        return Verdict("not decided", f"{why}; the intervals overlap")

    return rule


def finds(name: str, times: int, share: float) -> Rule:
    """Return the rule: at least `share` of the passkeys are found at `times` the length."""

    def rule(measured: Measured) -> Verdict:
        problems = unconverged(measured, [name], finds=True)
        if problems:
            return Verdict("not decided", "; ".join(problems))
        length = times * measured.length
        at = measured.readings[name].passkey.get(length)
        if at is None:
            return Verdict("not decided", f"no passkeys were asked for at {length} tokens")
        why = f"{at.value:.0%} of the passkeys are found at {length} tokens (bound {share:.0%})"
        if at.low >= share:
            return Verdict("reproduced", why)
        return Verdict("not reproduced" if at.high < share else "not decided", why)

    return rule


def _bounded(own: Figure, bound: float, why: str) -> Verdict:
    """Return the verdict on "own is at most the bound": not decided if its interval includes it."""
    if own.high <= bound:
        return Verdict("reproduced", why)
    if own.low > bound:
        return Verdict("not reproduced", why)
    return Verdict("not decided", f"{why}; the interval includes {bound:g}")


def _times(figure: Figure) -> str:
    if figure.interval is None:
        return f"{figure.value:.3f} times"
    return f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f}) times"

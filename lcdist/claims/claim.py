"""Define a claim, the readings that it needs, and its three possible answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Word = Literal["reproduced", "not reproduced", "not decided"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """A measured number and its 95 % interval; None where there is none."""

    value: float
    interval: Interval | None = None

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.interval[0] if self.interval else self.value

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.interval[1] if self.interval else self.value


@dataclass(frozen=True)
class Reading:
    """Hold the figures of a model that read held-out text in one way.

    Attributes:
        perplexity: of real text by length; a length whose perplexity is not finite is left out.
        passkey: share of the passkeys that were found, by length; empty if it was not asked.
        shares: share of the past blocks that a token reads at each length, for landmark attention.
        pieces: by length, scored tokens and their nats of each piece of the text, by which readings
            of the same text are compared.
    """

    perplexity: Mapping[int, Figure]
    passkey: Mapping[int, Figure] = field(default_factory=dict)
    shares: Mapping[int, float] = field(default_factory=dict)
    pieces: Mapping[int, Sequence[tuple[int, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """Describe how a training went.

    Attributes:
        curve: (tokens trained on, training loss), averaged over some steps each.
        seconds: of all steps.
        flops: of all steps, from the plan.
    """

    curve: tuple[tuple[int, float], ...]
    seconds: float
    flops: float


@dataclass(frozen=True)
class Measured:
    """All that was measured in a profile.

    Attributes:
        length: tokens at which the models were trained.
        unigram: perplexity of the held-out real text for a model that knows how often each token
            occurs in it and nothing else.
        decides: whether the profile trains long enough for any claim to be decided.
        readings: by name; one that has not been made is missing.
        trainings: by name of the job; one that has not been finished is missing.
    """

    length: int
    unigram: float
    decides: bool
    readings: Mapping[str, Reading]
    trainings: Mapping[str, Training] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The answer to a claim, and the figures that gave it in one sentence."""

    word: Word
    why: str


Rule = Callable[[Measured], Verdict]


@dataclass(frozen=True)
class Claim:
    """A claim, and how it is decided.

    Attributes:
        name: on the command line and in tables.
        paper: its arXiv id; empty: the claim is ours.
        sentence: what is claimed.
        figures: what the paper measured, in words and numbers.
        source: where these figures were found.
        readings: names of the readings that the rule needs.
        test: what the rule asks of our figures, in one sentence.
        rule: decides from what was measured; called when all readings are there.
    """

    name: str
    paper: str
    sentence: str
    figures: str
    source: str
    readings: tuple[str, ...]
    test: str
    rule: Rule


def decide(claim: Claim, measured: Measured) -> Verdict:
    """Return the answer to a claim: "not decided" until all that it needs was measured."""
    missing = [name for name in claim.readings if name not in measured.readings]
    if missing:
        return Verdict("not decided", f"not measured yet: {', '.join(missing)}")
    if not measured.decides:
        return Verdict("not decided", "this profile trains for too few steps to decide anything")
    return claim.rule(measured)

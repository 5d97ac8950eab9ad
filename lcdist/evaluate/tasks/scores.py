"""Scores of predictions: RULER's string match, passkeys, effective length.

The scores of RULER are those of its released program (arXiv:2404.06654, github.com/NVIDIA/RULER).
Here they are shares from 0 to 1; there they are percentages.
"""

import re
from collections.abc import Mapping, Sequence

from lcdist.config.evaluate import EFFECTIVE_SCORE

_CONTROL = re.compile(r"[\x00-\x1f]")
_NUMBER = re.compile(r"\d+")


def cleaned(prediction: str) -> str:
    """Return a prediction as RULER scores it: control characters as line ends, no space around."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the share of references that occur in a prediction, in any case of letters."""
    text = cleaned(prediction).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def first_number_matches(prediction: str, references: Sequence[str]) -> float:
    """Return 1 if the first number in a prediction is the reference, else 0."""
    found = _NUMBER.search(prediction)
    return float(found is not None and found.group() == references[0])


def effective_length(
    averages: Mapping[int, float], threshold: float = EFFECTIVE_SCORE
) -> int | None:
    """Return the longest length whose average is at least `threshold`, as RULER counts; or None.

    Args:
        averages: of all tasks, in percent, by length.
        threshold: in percent.
    """
    return max((n for n, average in averages.items() if average >= threshold), default=None)

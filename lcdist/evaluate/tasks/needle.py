"""A needle at a chosen depth of a text, for a map of lengths and depths.

The needle and the question are those of RULER's niah_single_2: a number of seven digits that
belongs to two words. The text is the user's, from another place in each case, or without one a
paragraph over and over.
"""

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

from lcdist.evaluate.tasks.case import Case, PromptFormat, Question, Room, fullest
from lcdist.evaluate.tasks.draws import Draws
from lcdist.evaluate.tasks.haystack import NOISE, Essay, inserted
from lcdist.evaluate.tasks.niah import Needles, hide

# A tokenizer of bytes takes eight for " 1234567"; some models first repeat words of the question.
MAX_NEW_TOKENS = 32
_NEEDLE = Needles("needle", "essay")


def depths(count: int) -> list[float]:
    """Return depths from 0 (first) to 1 (last), evenly spaced; the middle if there is but one."""
    return [n / (count - 1) for n in range(count)] if count > 1 else [0.5]


def needle_case(  # noqa: PLR0913
    prompt_format: PromptFormat,
    length: int,
    depth: float,
    seed: int,
    number: int,
    text: Essay | None = None,
) -> Case:
    """Return case `number` of a cell of the map.

    Args:
        prompt_format: writes the prompt.
        length: of prompt and answer, in tokens.
        depth: share of the text before the needle, which stands between two sentences.
        seed: of all cases.
        number: of the case.
        text: the user's; None: a repeated paragraph.

    Raises:
        TooShortError: needle and question do not fit.
    """
    draws = Draws(seed, "needle", length, repr(depth), number)
    hidden = hide(_NEEDLE, draws.part("needles"))
    start = 0 if text is None else draws.part("text").below(len(text.words))

    def sentences(size: int) -> list[str]:
        return [NOISE] * size if text is None else text.sentences(start, size, min(size, 2))

    def build(size: int) -> Question:
        found = sentences(size)
        return hidden.question(
            _NEEDLE.value_kind, inserted(found, hidden.needles, [_border(found, depth)])
        )

    size, _, case = fullest(build, prompt_format, Room(length, MAX_NEW_TOKENS), least=0)
    found = sentences(size)
    before = sum(map(len, found[: _border(found, depth)]))
    return dataclasses.replace(case, depth=before / max(1, sum(map(len, found))))


def _border(sentences: Sequence[str], depth: float) -> int:
    """Return the number of sentences before the place nearest to a depth, by their characters."""
    ends = [0, *accumulate(map(len, sentences))]
    return min(range(len(ends)), key=lambda n: abs(ends[n] - depth * ends[-1]))

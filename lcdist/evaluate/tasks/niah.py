"""Needles in a haystack, as RULER defines them (arXiv:2404.06654, github.com/NVIDIA/RULER).

A needle says which magic value belongs to a key; the question asks for the values of one key or
several. What differs from the released program: the words of keys are our own, every case starts
at another place of the essay, no needle of the haystack has a key that is asked for, and each case
is filled to its own length.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from lcdist.evaluate.tasks.case import Case, PromptFormat, Question, Room, fullest
from lcdist.evaluate.tasks.draws import Draws
from lcdist.evaluate.tasks.haystack import NOISE, Essay, inserted
from lcdist.evaluate.tasks.words import KEYS, key_name

Kind = Literal["numbers", "words", "uuids"]
MAX_NEW_TOKENS = 128
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# One value is asked for, or several.
_ONE = (
    "A special magic {one} is hidden within the following text. Make sure to memorize it. I will "
    "quiz you about the {one} afterwards.\n{context}\nWhat is the special magic {one} for {query} "
    "mentioned in the provided text?",
    " The special magic {one} for {query} mentioned in the provided text is",
)
_SEVERAL = (
    "Some special magic {many} are hidden within the following text. Make sure to memorize it. I "
    "will quiz you about the {many} afterwards.\n{context}\nWhat are all the special magic {many} "
    "for {query} mentioned in the provided text?",
    " The special magic {many} for {query} mentioned in the provided text are",
)
# Percent of the sentences before a needle in an essay: 40 of them, evenly spaced and rounded.
_DEPTHS = tuple(round(100 * n / 39) for n in range(40))
_DIGITS = 7


@dataclass(frozen=True)
class Needles:
    """A task.

    Attributes:
        name: other names make other cases.
        haystack: of one paragraph, of other needles, or of the user's text.
        key_kind: what keys are.
        value_kind: what values are.
        keys: number of keys.
        values: number of values of each key.
        queries: number of keys that are asked for.
    """

    name: str
    haystack: Literal["noise", "needles", "essay"]
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


@dataclass(frozen=True)
class Hidden:
    """The needles of a case, and what is asked about them.

    Attributes:
        needles: sentences.
        keys: of the needles.
        asked: keys that are asked for.
        answers: their values.
    """

    needles: tuple[str, ...]
    keys: frozenset[str]
    asked: tuple[str, ...]
    answers: tuple[str, ...]

    def question(self, kind: Kind, context: str) -> Question:
        """Return the question about a text with the needles."""
        *first, last = self.asked
        query = f"{', '.join(first)}, and {last}" if first else last
        text, prefix = _ONE if len(self.answers) == 1 else _SEVERAL
        words = {"one": kind[:-1], "many": kind, "query": query}
        return Question(text.format(context=context, **words), prefix.format(**words), self.answers)


def needles_case(
    task: Needles,
    prompt_format: PromptFormat,
    length: int,
    seed: int,
    number: int,
    text: Essay | None = None,
) -> Case:
    """Return case `number` of a task at a length in tokens.

    Args:
        task: what is hidden where.
        prompt_format: writes the prompt.
        length: of prompt and answer.
        seed: of all cases.
        number: of the case.
        text: the user's, for a haystack that is an essay.

    Raises:
        TooShortError: the needles and the question do not fit.
    """
    draws = Draws(seed, task.name, length, number)
    hidden = hide(task, draws.part("needles"))
    context = (
        _essay(hidden, text, draws) if task.haystack == "essay" else _lines(task, hidden, draws)
    )

    def build(size: int) -> Question:
        return hidden.question(task.value_kind, context(size))

    room = Room(length, MAX_NEW_TOKENS)
    return fullest(build, prompt_format, room, least=2 * len(hidden.needles))[2]


def hide(task: Needles, draws: Draws) -> Hidden:
    """Draw the needles of a case, their order, and which of their keys are asked for."""
    keys = list[str]()
    while len(keys) < task.keys:
        key = value_of(task.key_kind, draws)
        if key not in keys:
            keys.append(key)
    values = {key: [value_of(task.value_kind, draws) for _ in range(task.values)] for key in keys}
    needles = [needle(task.value_kind, key, value) for key in keys for value in values[key]]
    draws.shuffle(needles)
    asked = tuple(keys[n] for n in draws.sample(task.keys, task.queries))
    answers = tuple(value for key in asked for value in values[key])
    return Hidden(tuple(needles), frozenset(keys), asked, answers)


def needle(kind: Kind, key: str, value: str) -> str:
    """Return the sentence that says which value belongs to a key."""
    return _NEEDLE.format(kind=kind, key=key, value=value)


def value_of(kind: Kind, draws: Draws) -> str:
    """Draw a key or a value: a number of seven digits, two words, or a UUID of version 4."""
    if kind == "numbers":
        return str(draws.between(10 ** (_DIGITS - 1), 10**_DIGITS - 1))
    if kind == "words":
        return key_name(draws.below(KEYS))
    return str(uuid.UUID(int=draws.below(2**64) << 64 | draws.below(2**64), version=4))


def _essay(hidden: Hidden, text: Essay | None, draws: Draws) -> Callable[[int], str]:
    """Return what makes an essay of so many words with the needles in it."""
    assert text is not None
    start = draws.part("essay").below(len(text.words))
    order = draws.part("places").sample(len(_DEPTHS), len(hidden.needles))
    depths = sorted(_DEPTHS[n] for n in order)

    def context(size: int) -> str:
        sentences = text.sentences(start, size, 2 * len(hidden.needles))
        return inserted(sentences, hidden.needles, [len(sentences) * d // 100 for d in depths])

    return context


def _lines(task: Needles, hidden: Hidden, draws: Draws) -> Callable[[int], str]:
    """Return what makes so many lines of the haystack with the needles between them."""

    def context(size: int) -> str:
        lines = [NOISE] * size
        if task.haystack == "needles":
            drawn = draws.part("haystack")
            for place in range(size):
                while (key := value_of(task.key_kind, drawn)) in hidden.keys:
                    pass
                lines[place] = needle(task.value_kind, key, value_of(task.value_kind, drawn))
        places = sorted(draws.part("places").sample(size, len(hidden.needles)), reverse=True)
        for place, line in zip(places, hidden.needles, strict=True):
            lines.insert(place, line)
        return "\n".join(lines)

    return context

"""One case of a task: a question of at most so many tokens, and the answers that it expects."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        text: the haystack and the question.
        prefix: how the answer begins; the model goes on from there.
        references: what a right answer contains.
    """

    text: str
    prefix: str
    references: tuple[str, ...]


class PromptFormat(Protocol):
    """Write a question as the tokens that a model reads."""

    def tokens(self, question: Question) -> list[int]:
        """Return the prompt of a question."""
        ...


@dataclass(frozen=True)
class Case:
    """A question as tokens.

    Attributes:
        prompt: its tokens; with `max_new_tokens` they are no more than the length asked for.
        references: what a right answer contains.
        max_new_tokens: room for the answer.
        depth: place of what is asked for, from 0 (first) to 1 (last); None: several places.
    """

    prompt: tuple[int, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    depth: float | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the room for the answer."""
        return len(self.prompt) + self.max_new_tokens


class TooShortError(ValueError):
    """The smallest question of a task does not fit a length.

    Attributes:
        needed: tokens that it takes, with the room for the answer.
    """

    def __init__(self, length: int, needed: int) -> None:
        super().__init__(f"{length} tokens: the shortest case takes {needed}")
        self.needed = needed


@dataclass(frozen=True)
class Room:
    """The tokens that a case may have.

    Attributes:
        length: of the prompt and the answer.
        max_new_tokens: of the answer.
    """

    length: int
    max_new_tokens: int

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.length - self.max_new_tokens


def fullest(
    build: Callable[[int], Question],
    prompt_format: PromptFormat,
    room: Room,
    least: int,
    most: int | None = None,
) -> tuple[int, Question, Case]:
    """Return the size, question and case that fill the room as far as whole units do.

    Tokens grow nearly in proportion to units, so a line through two sizes finds the next one to
    try; every third step halves the range instead, where that line keeps missing. A question whose
    haystack is one unit larger would not fit, by the average size of a unit.

    Args:
        build: makes the question of a haystack of so many units; equal sizes, equal questions.
        prompt_format: writes it as tokens.
        room: for prompt and answer.
        least: units of the smallest haystack.
        most: units of the largest one; None: any number.

    Raises:
        TooShortError: the smallest question does not fit.
    """

    def measured(size: int) -> tuple[int, Question, list[int]]:
        question = build(size)
        return size, question, prompt_format.tokens(question)

    best = measured(least)
    if len(best[2]) > room.prompt:
        raise TooShortError(room.length, len(best[2]) + room.max_new_tokens)
    unit, above, tries = _tokens_of_a_unit(build, prompt_format, best, most), None, 0
    while best[0] != most:
        size, _, tokens = best
        left = room.prompt - len(tokens)
        if left < unit or (above is not None and above[0] - size < 2):
            break
        guess, tries = size + int(left / unit), tries + 1
        if above is not None:
            slope = (above[1] - len(tokens)) / (above[0] - size)
            guess = (
                (size + above[0]) // 2 if tries % 3 == 0 else size + int(left / max(slope, 1e-9))
            )
            guess = min(guess, above[0] - 1)
        found = measured(max(size + 1, guess if most is None else min(guess, most)))
        if len(found[2]) <= room.prompt:
            best = found
        else:
            above = (found[0], len(found[2]))
    case = Case(tuple(best[2]), best[1].references, room.max_new_tokens)
    return best[0], best[1], case


def _tokens_of_a_unit(
    build: Callable[[int], Question],
    prompt_format: PromptFormat,
    smallest: tuple[int, Question, list[int]],
    most: int | None,
) -> float:
    """Return about how many tokens one more unit takes, at least a small part of one."""
    size = 2 * smallest[0] + 8
    size = size if most is None else min(size, most)
    if size == smallest[0]:
        return 1.0
    more = len(prompt_format.tokens(build(size))) - len(smallest[2])
    return max(more / (size - smallest[0]), 0.05)

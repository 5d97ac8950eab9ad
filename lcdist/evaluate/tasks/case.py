"""One case of a task: a question of at most so many tokens, and the answers that it expects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

# A prompt is full when this part of its room is left.
_ENOUGH = 5000
# After so many sizes the range is halved.
_STRAIGHT = 8


@dataclass(frozen=True)
class Question:
    """Describe one question to a model.

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

    A line through the last two sizes finds the next one to try; where it keeps missing, every
    second step halves the range instead. The haystack with one unit more would not fit, by the
    average size of a unit; or all is full but for a part in 5,000, since long texts take seconds to
    tokenize.

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

    best, above, target = measured(least), None, room.prompt
    if len(best[2]) > target:
        raise TooShortError(room.length, len(best[2]) + room.max_new_tokens)
    points, unit = [(least, len(best[2]))], 0.0
    while target - len(best[2]) >= max(unit, target / _ENOUGH):
        # The first step is a small one, for a line.
        size = _next_size(points, target) if len(points) > 1 else 2 * least + 8
        last = most if above is None else above - 1
        if above is not None and len(points) > _STRAIGHT and len(points) % 2:
            size = (best[0] + above) // 2
        size = max(best[0] + 1, size if last is None else min(size, last))
        if last is not None and size > last:
            break
        found = measured(size)
        points.append((size, len(found[2])))
        if len(found[2]) <= target:
            best, unit = found, (len(found[2]) - points[0][1]) / (size - least)
        else:
            above = size
    case = Case(tuple(best[2]), best[1].references, room.max_new_tokens)
    return best[0], best[1], case


def _next_size(points: Sequence[tuple[int, int]], target: int) -> int:
    """Return where the line through the last two sizes and their tokens reaches `target`."""
    (first, fewer), (size, tokens) = points[-2:]
    # Equal numbers of tokens make no line; then the range is searched in large steps.
    slope = (tokens - fewer) / (size - first)
    return size + int((target - tokens) / slope) if slope > 0 else 2 * size

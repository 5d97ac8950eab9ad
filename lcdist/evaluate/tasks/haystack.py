"""Text that hides what a task asks for: one paragraph over and over, or the user's own text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# The paragraph of the passkey task (landmark attention, arXiv:2305.16300) and of RULER.
NOISE_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NOISE = " ".join(NOISE_SENTENCES)
# Words without a space for so many characters are cut: a line of digits, or Chinese.
_LONGEST_WORD = 40
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’)\]]*\s*$")


@dataclass(frozen=True)
class Essay:
    """A text in words, each with the space after it.

    Attributes:
        words: in order; with nothing between them they are the text.
    """

    words: tuple[str, ...]

    @cached_property
    def ends(self) -> tuple[bool, ...]:
        """Return, for each word, whether a sentence ends with it."""
        return tuple(bool(_SENTENCE_END.search(word)) for word in self.words)

    def sentences(self, start: int, count: int, least: int) -> list[str]:
        """Return `count` words as sentences; behind its last word the text begins again.

        Args:
            start: number of the first word.
            count: number of words, at least `least`.
            least: sentences to return at least: where there are fewer, each word is one, as in
                program text.
        """
        found, begun = list[str](), list[str]()
        for number in range(start, start + count):
            place = number % len(self.words)
            begun.append(self.words[place])
            if self.ends[place]:
                found.append("".join(begun).strip())
                begun = []
        if begun:
            found.append("".join(begun).strip())
        if len(found) >= least:
            return found
        taken = [self.words[n % len(self.words)] for n in range(start, start + count)]
        return [word.strip() for word in taken]


def essay(text: str, refused: Sequence[str] = ()) -> Essay:
    """Return a text as words, with one space where there were several, or line ends.

    Args:
        text: any text.
        refused: what no word may contain: the texts of tokens that a chat template writes.

    Raises:
        ValueError: the text has no word.
    """
    words = list[str]()
    for word in text.split():
        if any(special in word for special in refused):
            continue
        cut = [word[at : at + _LONGEST_WORD] for at in range(0, len(word), _LONGEST_WORD)]
        words += [*cut[:-1], f"{cut[-1]} "]
    if not words:
        raise ValueError("the text to hide needles in has no word")
    return Essay(tuple(words))


def inserted(sentences: Sequence[str], needles: Sequence[str], places: Sequence[int]) -> str:
    """Return sentences with needles between them.

    Args:
        sentences: the text.
        needles: one for each place, in the order in which they are to stand.
        places: number of sentences before each needle, ascending.
    """
    borders = [0, *places, len(sentences)]
    pieces = [" ".join(sentences[borders[0] : borders[1]])]
    for number, needle in enumerate(needles, 1):
        pieces += [needle, " ".join(sentences[borders[number] : borders[number + 1]])]
    return " ".join(piece for piece in pieces if piece)

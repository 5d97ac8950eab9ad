"""Common and frequent words, as RULER defines them: which words of a list occur most often?

What differs from the released program: the words of lists are our own, with pairs of words where a
list needs more than there are; and a list of coded words is never so short that the third and the
fourth most frequent one occur equally often.
"""

import math
from collections.abc import Sequence

from lcdist.evaluate.tasks.case import Case, PromptFormat, Question, Room, fullest
from lcdist.evaluate.tasks.draws import Draws
from lcdist.evaluate.tasks.words import PAIRS, PLAIN, pair

COMMON_NEW_TOKENS, FREQUENT_NEW_TOKENS = 120, 50
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\nQuestion: What are the 10 most common "
    "words in the above list?"
)
_COMMON_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_COMMON_WORDS = 10
# From this length on, a list repeats common words 30 times and others 3 times; below, 6 and 1.
_LONG = 4096

_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\nQuestion: Do not provide any explanation. Please "
    "ignore the dots '....'. What are the three most frequently appeared words in the above coded "
    "text?"
)
_FREQUENT_PREFIX = (
    " Answer: According to the coded text above, the three most frequently appeared words are:"
)
_FREQUENT_WORDS = 3
_DOTS = "..."
_CODE_LETTERS = 6
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# One word of the vocabulary for so many tokens.
_TOKENS_OF_A_CODE = 50


def common_words_case(prompt_format: PromptFormat, length: int, seed: int, number: int) -> Case:
    """Return case `number` of common words at a length in tokens.

    Raises:
        TooShortError: the solved example and the smallest list do not fit.
    """
    draws = Draws(seed, "cwe", length, number)
    if length < _LONG:
        shown, repeats = _word_list(draws.part("example"), 20, (3, 1)), (6, 1)
    else:
        shown, repeats = _word_list(draws.part("example"), 40, (10, 3)), (30, 3)
    answer = " ".join(f"{n}. {word}" for n, word in enumerate(shown.references, 1))
    solved = f"{shown.text}{_COMMON_PREFIX} {answer}\n"

    def build(size: int) -> Question:
        question = _word_list(draws.part("list"), size, repeats)
        return Question(solved + question.text, _COMMON_PREFIX, question.references)

    room = Room(length, COMMON_NEW_TOKENS)
    return fullest(build, prompt_format, room, least=_COMMON_WORDS, most=PAIRS)[2]


def _word_list(draws: Draws, size: int, repeats: tuple[int, int]) -> Question:
    """Return the question about `size` different words; the first ten are the common ones."""
    if size <= len(PLAIN):
        words = [PLAIN[n] for n in draws.sample(len(PLAIN), size)]
    else:
        words = [pair(n) for n in draws.sample(PAIRS, size)]
    common, others = words[:_COMMON_WORDS], words[_COMMON_WORDS:]
    listed = common * repeats[0] + others * repeats[1]
    draws.shuffle(listed)
    context = " ".join(f"{n}. {word}" for n, word in enumerate(listed, 1))
    return Question(_COMMON.format(context=context), _COMMON_PREFIX, tuple(common))


def frequent_words_case(
    prompt_format: PromptFormat, length: int, seed: int, number: int, alpha: float = 2.0
) -> Case:
    """Return case `number` of frequent words at a length in tokens.

    The word of rank k occurs about k**-alpha times as often as the first, which is dots.

    Args:
        prompt_format: writes the prompt.
        length: of prompt and answer.
        seed: of all cases.
        number: of the case.
        alpha: exponent of the zeta distribution, above 1.

    Raises:
        TooShortError: no text with three most frequent words fits.
    """
    draws = Draws(seed, "fwe", length, number)
    room = Room(length, FREQUENT_NEW_TOKENS)
    vocabulary = _codes(draws.part("codes"), max(6, room.prompt // _TOKENS_OF_A_CODE))

    def counts(size: int) -> list[int]:
        return counts_by_rank(size, len(vocabulary), alpha)

    def build(size: int) -> Question:
        times = zip(vocabulary, counts(size), strict=True)
        words = [code for code, count in times for _ in range(count)]
        draws.part("order").shuffle(words)
        text = _FREQUENT.format(context=" ".join(words))
        return Question(text, _FREQUENT_PREFIX, tuple(vocabulary[1 : 1 + _FREQUENT_WORDS]))

    least = next(n for n in range(1, 10**9) if _is_decided(counts(n)))
    size, _, case = fullest(build, prompt_format, room, least)
    if _is_decided(counts(size)):
        return case
    smaller = next(n for n in range(size, 0, -1) if _is_decided(counts(n)))
    return fullest(build, prompt_format, room, smaller, most=smaller)[2]


def counts_by_rank(size: int, ranks: int, alpha: float) -> list[int]:
    """Return how often each rank occurs among `size` words of a zeta distribution, rounded down."""
    total = zeta(alpha)
    return [int(size / (rank**alpha * total)) for rank in range(1, ranks + 1)]


def _is_decided(counts: Sequence[int]) -> bool:
    """Return whether the words that are asked for occur more often than all others."""
    return counts[_FREQUENT_WORDS] > counts[_FREQUENT_WORDS + 1]


def _codes(draws: Draws, count: int) -> list[str]:
    """Return a vocabulary of coded words by rank; the first is the dots."""
    codes = dict[str, None]()
    while len(codes) < count - 1:
        codes["".join(draws.choice(_LETTERS) for _ in range(_CODE_LETTERS))] = None
    return [_DOTS, *codes]


def zeta(alpha: float) -> float:
    """Return Riemann's zeta function for alpha > 1, to 1e-12: Euler and Maclaurin's formula.

    Whole powers of whole numbers are exact on every machine, unlike their inverses.
    """
    terms = 64
    start = math.fsum(1 / n**alpha for n in range(1, terms))
    rest = terms ** (1 - alpha) / (alpha - 1) + terms**-alpha / 2
    correction = alpha * terms ** (-alpha - 1) / 12
    correction -= alpha * (alpha + 1) * (alpha + 2) * terms ** (-alpha - 3) / 720
    return start + rest + correction

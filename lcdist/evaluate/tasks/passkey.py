"""Passkey retrieval: a number of five digits in a text that repeats itself.

As in landmark attention (arXiv:2305.16300) and CoCA (arXiv:2309.08646): an instruction, the filler,
the key at a place drawn anew for each case, the filler again, and the question.
"""

import dataclasses

from lcdist.evaluate.tasks.case import Case, PromptFormat, Question, Room, fullest
from lcdist.evaluate.tasks.draws import Draws
from lcdist.evaluate.tasks.haystack import NOISE_SENTENCES

# A tokenizer of bytes takes six for " 12345".
MAX_NEW_TOKENS = 16
DIGITS = 5
_INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_KEY = "The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = "What is the pass key?"
_PREFIX = " The pass key is"


def passkey_case(prompt_format: PromptFormat, length: int, seed: int, number: int) -> Case:
    """Return case `number` at a length in tokens.

    Raises:
        TooShortError: the instruction, the key and the question do not fit.
    """
    draws = Draws(seed, "passkey", length, number)
    key = str(draws.part("key").between(10 ** (DIGITS - 1), 10**DIGITS - 1))
    # Of a filler of any size the same share stands before the key.
    share = draws.part("place").below(2**53) / 2**53

    def place(size: int) -> int:
        return int(share * (size + 1))

    def build(size: int) -> Question:
        return passkey_question(key, place(size), size - place(size))

    size, _, case = fullest(build, prompt_format, Room(length, MAX_NEW_TOKENS), least=0)
    return dataclasses.replace(case, depth=place(size) / max(1, size))


def passkey_question(key: str, before: int, after: int) -> Question:
    """Return the question for a key with so many sentences of filler before and after it."""
    filler = [NOISE_SENTENCES[n % len(NOISE_SENTENCES)] for n in range(before + after)]
    line = _KEY.format(key=key)
    lines = [_INSTRUCTION, " ".join(filler[:before]), line, " ".join(filler[before:]), _QUESTION]
    return Question("\n".join(text for text in lines if text), _PREFIX, (key,))

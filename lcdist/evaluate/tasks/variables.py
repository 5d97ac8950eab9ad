"""Variable tracking, as RULER defines it: chains of assignments hidden in a repeated paragraph.

The question asks for all variables that hold the value at the start of a chain. A solved example
with shorter names stands before it. What differs from the released program: at lengths below 1,000
tokens the example takes half of them, so that the question fits.
"""

from lcdist.evaluate.tasks.case import Case, PromptFormat, Question, Room, TooShortError, fullest
from lcdist.evaluate.tasks.draws import Draws
from lcdist.evaluate.tasks.haystack import NOISE

MAX_NEW_TOKENS = 30
_TEXT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} in the text above."
)
# It ends with a space, in the released program too: the example has two of them there.
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} "
    "variables are assigned the value {value}, they are: "
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Tokens of the example at most, and letters of the names in it and in the question.
_EXAMPLE = 500
_NAME_OF_EXAMPLE, _NAME = 3, 5


def variables_case(  # noqa: PLR0913
    prompt_format: PromptFormat,
    length: int,
    seed: int,
    number: int,
    hops: int = 4,
    chains: int = 1,
) -> Case:
    """Return case `number` at a length in tokens.

    Args:
        prompt_format: writes the prompt.
        length: of prompt and answer.
        seed: of all cases.
        number: of the case.
        hops: assignments after the first one of a chain.
        chains: number of chains; the first one is asked for.

    Raises:
        TooShortError: example and question do not fit.
    """
    draws = Draws(seed, "vt", length, number)
    example = _Chains(draws.part("example"), hops, chains, _NAME_OF_EXAMPLE)
    share, least = min(_EXAMPLE, (length - MAX_NEW_TOKENS) // 2), hops + 1
    try:
        _, shown, _ = fullest(example.question, prompt_format, Room(share, 0), least)
    except TooShortError:
        # As with a tokenizer of bytes: the smallest example is longer than it should be.
        shown = example.question(least)
    solved = f"{shown.text}{shown.prefix} {' '.join(shown.references)}\n\n"
    asked = _Chains(draws.part("question"), hops, chains, _NAME)

    def build(size: int) -> Question:
        question = asked.question(size)
        return Question(solved + question.text, question.prefix, question.references)

    return fullest(build, prompt_format, Room(length, MAX_NEW_TOKENS), least)[2]


class _Chains:
    """Chains of assignments: the value of the first variable goes to the next one, and so on."""

    def __init__(self, draws: Draws, hops: int, chains: int, letters: int) -> None:
        self._draws, count = draws, (hops + 1) * chains
        names = list[str]()
        while len(names) < count:
            name = "".join(draws.choice(_LETTERS) for _ in range(letters))
            if name not in names:
                names.append(name)
        values = [str(draws.between(10000, 99998)) for _ in range(chains)]
        self.names = tuple(names[: hops + 1])
        self.value = values[0]
        self._chains = [
            [
                f"VAR {names[at]} = {value}",
                *(f"VAR {names[at + n + 1]} = VAR {names[at + n]} " for n in range(hops)),
            ]
            for at, value in zip(range(0, count, hops + 1), values, strict=True)
        ]

    def question(self, size: int) -> Question:
        """Return the question with `size` paragraphs around the assignments."""
        lines = [NOISE] * size
        for number, chain in enumerate(self._chains):
            places = sorted(self._draws.part(f"places {number}").sample(len(lines), len(chain)))
            for inserted, (place, assignment) in enumerate(zip(places, chain, strict=True)):
                lines.insert(place + inserted, assignment)
        words = {"value": self.value, "count": len(self.names)}
        text = _TEXT.format(context="\n".join(lines), **words)
        return Question(text, _PREFIX.format(**words), self.names)

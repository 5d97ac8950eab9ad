"""Cells of a part: cases that are scored together, such as one task at one length."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.evaluate.parts import Count, Unit
from lcdist.evaluate.tasks.case import Case, TooShortError
from lcdist.evaluate.tasks.inputs import TaskInputs
from lcdist.evaluate.tasks.predict import continuations
from lcdist.utils.intervals import fraction_interval

# A unit has at most so many tokens and cases, or is one case.
_TOKENS_OF_A_UNIT = 2**16
_CASES_OF_A_UNIT = 16
# Up to this length it is tried whether all cases fit; beyond it, what fits a shorter length fits.
_ALWAYS_TRIED = 8192
Score = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class Cell:
    """Cases that are scored together.

    Attributes:
        name: of the cell.
        length: of each case, in tokens.
        count: number of cases.
        case: makes the case of a number.
        score: of an answer, from 0 to 1.
    """

    name: str
    length: int
    count: int
    case: Callable[[int], Case]
    score: Score


@dataclass(frozen=True)
class CellScores:
    """Hold the scores of the cases of a cell.

    Attributes:
        scores: of each case, from 0 to 1.
        lengths: tokens of each case.
    """

    scores: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Average score."""
        return sum(self.scores) / len(self.scores)

    @property
    def interval(self) -> list[float] | None:
        """Confidence interval of the average score."""
        return fraction_interval(sum(self.scores), len(self.scores))

    @property
    def mean_length(self) -> float:
        """Average number of tokens of a case."""
        return sum(self.lengths) / len(self.lengths)


def together(cells: Sequence[CellScores]) -> CellScores:
    """Return the scores of several cells as one."""
    scores = tuple(score for cell in cells for score in cell.scores)
    return CellScores(scores, tuple(length for cell in cells for length in cell.lengths))


class Cells:
    """Units of cells, and what they measure.

    Measured: "scores", "lengths" (in tokens) and "answers" of the cases of a unit.
    """

    def __init__(self, loaded: LoadedModel, inputs: TaskInputs, cells: Sequence[Cell]) -> None:
        self._loaded, self._inputs = loaded, inputs
        self._units: dict[str, tuple[Cell, range]] = {}
        for cell in cells:
            step = max(1, min(_CASES_OF_A_UNIT, _TOKENS_OF_A_UNIT // cell.length))
            for first in range(0, cell.count, step):
                numbers = range(first, min(first + step, cell.count))
                self._units[f"{cell.name}, cases {first} to {numbers[-1]}"] = cell, numbers

    def units(self) -> list[Unit]:
        """Return the units of all cells."""
        return [
            Unit(key, cell.length * len(numbers)) for key, (cell, numbers) in self._units.items()
        ]

    def measure(self, key: str, count: Count) -> dict[str, Any]:
        """Let the model answer the cases of a unit, and score the answers."""
        cell, numbers = self._units[key]
        cases = [cell.case(number) for number in numbers]
        prompts, form = [case.prompt for case in cases], self._inputs.form
        found = continuations(self._loaded, prompts, cases[0].max_new_tokens, form.stops)
        answers = [form.decode(tokens) for tokens in found]
        count(cell.length * len(numbers))
        scored = zip(answers, cases, strict=True)
        return {
            "scores": [cell.score(answer, case.references) for answer, case in scored],
            "lengths": [case.length for case in cases],
            "answers": answers,
        }

    def scores(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, CellScores]:
        """Return the scores of each cell by its name."""
        found: dict[str, tuple[list[float], list[int]]] = {}
        for key, (cell, _) in self._units.items():
            scores, lengths = found.setdefault(cell.name, ([], []))
            scores += measured[key]["scores"]
            lengths += measured[key]["lengths"]
        return {name: CellScores(tuple(s), tuple(n)) for name, (s, n) in found.items()}


class CellPart:
    """Base of the parts that consist of cells."""

    _cells: Cells

    def units(self) -> list[Unit]:
        """Return units of some cases of one cell."""
        return self._cells.units()

    def measure(self, key: str, count: Count) -> dict[str, Any]:
        """Let the model answer the cases of a unit."""
        return self._cells.measure(key, count)


def lengths_that_fit(
    lengths: Sequence[int], count: int, cases: Callable[[int], Callable[[int], Case]]
) -> tuple[list[int], list[dict[str, int]]]:
    """Return the lengths that a task fits, and those that are too short with what they would take.

    Args:
        lengths: in tokens.
        count: number of cases of a length.
        cases: returns what makes the cases of a length.
    """
    fit, too_short, tried_in_vain = list[int](), list[dict[str, int]](), False
    for length in sorted(set(lengths)):
        if length > _ALWAYS_TRIED and not tried_in_vain:
            fit.append(length)
            continue
        # What others take is not exactly what the first one does.
        needed = _needed(cases(length), range(count))
        if needed is None:
            fit.append(length)
        else:
            too_short.append({"length": length, "needed": needed})
        tried_in_vain = needed is not None
    return fit, too_short


def _needed(case: Callable[[int], Case], numbers: Sequence[int]) -> int | None:
    """Return what the first case that does not fit its length takes; None if all fit."""
    try:
        for number in numbers:
            case(number)
    except TooShortError as error:
        return error.needed
    return None


def refuse_none_fits(
    name: str, lengths: Sequence[int], too_short: Sequence[Mapping[str, int]]
) -> None:
    """Raise ValueError: a part fits none of the lengths."""
    needed = min(each["needed"] for each in too_short)
    raise ValueError(
        f"evaluate.lengths = {sorted(lengths)}: with this tokenizer the shortest case of {name} "
        f"takes about {needed:,} tokens: give longer lengths"
    )

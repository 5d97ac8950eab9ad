"""The part "ruler": RULER's tasks by length, their average, and the effective length."""

from collections.abc import Callable, Mapping
from typing import Any

from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.evaluate.parts import PartKind
from lcdist.evaluate.tasks.case import Case
from lcdist.evaluate.tasks.cells import (
    Cell,
    CellPart,
    Cells,
    CellScores,
    lengths_that_fit,
    refuse_none_fits,
    together,
)
from lcdist.evaluate.tasks.inputs import TaskInputs, task_inputs
from lcdist.evaluate.tasks.ruler import RULER
from lcdist.evaluate.tasks.scores import effective_length, string_match_all


class Ruler(CellPart):
    """RULER's tasks, `evaluate.samples` cases of each at each length."""

    def __init__(self, loaded: LoadedModel) -> None:
        inputs = task_inputs(loaded, with_text=True)
        self.threshold, self.prompt = inputs.asked.effective_score, inputs.asked.prompt
        self.tasks, self.left_out = _chosen(inputs)
        self.lengths = sorted(set(inputs.asked.lengths))
        self.fits: dict[str, list[int]] = {}
        self.too_short: list[dict[str, Any]] = []
        cells = []
        for task in self.tasks:
            fits, too_short = lengths_that_fit(
                self.lengths,
                inputs.asked.samples,
                lambda length, task=task: _cases(task, inputs, length),
            )
            self.fits[task] = fits
            self.too_short += [{"task": task, **each} for each in too_short]
            cells += [
                Cell(
                    _name(task, length),
                    length,
                    inputs.asked.samples,
                    _cases(task, inputs, length),
                    string_match_all,
                )
                for length in fits
            ]
        if not cells:
            refuse_none_fits("RULER's tasks", self.lengths, self.too_short)
        self._cells = Cells(loaded, inputs, cells)

    def summary(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return scores in percent by task and length, their averages, and the effective length.

        A length that is too short for one of the tasks has no average: it would be of others.
        """
        found = self._cells.scores(measured)
        averages = {
            length: together([found[_name(task, length)] for task in self.tasks])
            for length in self.lengths
            if all(length in self.fits[task] for task in self.tasks)
        }
        percent = {length: 100 * average.mean for length, average in averages.items()}
        return {
            "lengths": self.lengths,
            "tasks": {
                task: self._row([found.get(_name(task, length)) for length in self.lengths])
                for task in self.tasks
            },
            "average": self._row([averages.get(length) for length in self.lengths]),
            "effective_length": effective_length(percent, self.threshold),
            "threshold": self.threshold,
            "prompt": self.prompt,
            "left_out": self.left_out,
            "too_short": self.too_short,
        }

    def _row(self, cells: list[CellScores | None]) -> dict[str, Any]:
        """Return the figures of one task at all lengths, None where it does not fit."""
        return {
            "score": [None if each is None else 100 * each.mean for each in cells],
            "interval": [
                None if each is None else [100 * end for end in each.interval or ()]
                for each in cells
            ],
            "cases": [0 if each is None else len(each.scores) for each in cells],
            "tokens": [None if each is None else each.mean_length for each in cells],
        }


def _chosen(inputs: TaskInputs) -> tuple[list[str], list[str]]:
    """Return the tasks to measure, and those that are left out as they need the user's text.

    Raises:
        ValueError: a task that is asked for by name needs text, and there is none.
    """
    asked = inputs.asked.ruler_tasks
    without = [name for name in asked or RULER if RULER[name].needs_text and inputs.text is None]
    if asked and without:
        raise ValueError(
            f"evaluate.ruler_tasks names '{without[0]}', which hides needles in held-out text, and "
            "there is none: name a folder of 'lcdist tokenize' with data.path=FOLDER, or leave the "
            "task out"
        )
    return [name for name in asked or RULER if name not in without], without


def _cases(task: str, inputs: TaskInputs, length: int) -> Callable[[int], Case]:
    seed = inputs.asked.seed
    return lambda number: RULER[task].case(inputs.form, length, seed, number, inputs.text)


def _name(task: str, length: int) -> str:
    return f"{task}, length {length}"


RULER_PART = PartKind("ruler", lambda loaded: Ruler(loaded))

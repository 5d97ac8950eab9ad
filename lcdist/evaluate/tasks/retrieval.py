"""The parts "passkey" and "needle": one thing to find, by length, and by length and depth."""

from collections.abc import Callable, Mapping
from typing import Any

from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.evaluate.parts import PartKind
from lcdist.evaluate.tasks.case import Case
from lcdist.evaluate.tasks.cells import (
    Cell,
    CellPart,
    Cells,
    lengths_that_fit,
    refuse_none_fits,
    together,
)
from lcdist.evaluate.tasks.inputs import task_inputs
from lcdist.evaluate.tasks.needle import depths, needle_case
from lcdist.evaluate.tasks.passkey import passkey_case
from lcdist.evaluate.tasks.scores import first_number_matches, string_match_all


class Passkey(CellPart):
    """Passkey retrieval by length: `evaluate.samples` cases each, at any depth."""

    def __init__(self, loaded: LoadedModel) -> None:
        inputs = task_inputs(loaded, with_text=False)
        asked, form, self.prompt = inputs.asked, inputs.form, inputs.asked.prompt

        def of_length(length: int) -> Callable[[int], Case]:
            return lambda number: passkey_case(form, length, asked.seed, number)

        self.lengths, self.too_short = lengths_that_fit(asked.lengths, asked.samples, of_length)
        if not self.lengths:
            refuse_none_fits("passkey", asked.lengths, self.too_short)
        cells = [
            Cell(_name(length), length, asked.samples, of_length(length), first_number_matches)
            for length in self.lengths
        ]
        self._cells = Cells(loaded, inputs, cells)

    def summary(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return accuracy, its interval, cases and their mean tokens by length."""
        by_name = self._cells.scores(measured)
        found = [by_name[_name(length)] for length in self.lengths]
        return {
            "lengths": self.lengths,
            "accuracy": [each.mean for each in found],
            "interval": [each.interval for each in found],
            "cases": [len(each.scores) for each in found],
            "tokens": [each.mean_length for each in found],
            "prompt": self.prompt,
            "too_short": self.too_short,
        }


class Needle(CellPart):
    """A map of lengths and depths; the cases of a length are spread over `evaluate.depths`."""

    def __init__(self, loaded: LoadedModel) -> None:
        inputs = task_inputs(loaded, with_text=True)
        asked, form, self.text = inputs.asked, inputs.form, inputs.text
        self.prompt, self.depths = asked.prompt, depths(asked.depths)
        # The same number at each depth, at least one.
        self.count = -(-asked.samples // len(self.depths))

        def of(length: int, depth: float) -> Callable[[int], Case]:
            return lambda n: needle_case(form, length, depth, asked.seed, n, inputs.text)

        self.lengths, self.too_short = lengths_that_fit(
            asked.lengths, self.count, lambda length: of(length, 0.5)
        )
        if not self.lengths:
            refuse_none_fits("needle", asked.lengths, self.too_short)
        cells = [
            Cell(_name(length, depth), length, self.count, of(length, depth), string_match_all)
            for length in self.lengths
            for depth in self.depths
        ]
        self._cells = Cells(loaded, inputs, cells)

    def summary(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return accuracy by depth and length, and the average of each length with its interval."""
        found = self._cells.scores(measured)
        averages = [
            together([found[_name(length, depth)] for depth in self.depths])
            for length in self.lengths
        ]
        return {
            "lengths": self.lengths,
            "depths": self.depths,
            "accuracy": [
                [found[_name(length, depth)].mean for length in self.lengths]
                for depth in self.depths
            ],
            "average": [each.mean for each in averages],
            "interval": [each.interval for each in averages],
            "cases": self.count,
            "tokens": [each.mean_length for each in averages],
            "text": "a repeated paragraph" if self.text is None else "the held-out text",
            "prompt": self.prompt,
            "too_short": self.too_short,
        }


def _name(length: int, depth: float | None = None) -> str:
    return f"length {length}" if depth is None else f"length {length}, depth {depth:.4f}"


PASSKEY = PartKind("passkey", lambda loaded: Passkey(loaded))
NEEDLE = PartKind("needle", lambda loaded: Needle(loaded))

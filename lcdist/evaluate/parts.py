"""Parts of an evaluation: what can be measured, each cut into units that are kept when done.

To add a part:

1. add its name to `Measure` in `lcdist/config/evaluate.py`, and the keys that it needs there;
2. write a class as `Part` describes it, and a `PartKind` that opens it;
3. add the kind to `PART_KINDS` in `lcdist/evaluate/registry.py`;
4. add a function that draws its figures to `SECTIONS` in `lcdist/report/evaluation_sections.py`:
   `lcdist evaluate` prints the tables of that section, reports show all of it.

A unit is the smallest piece of work that survives an interruption: seconds or minutes, rather than
hours. What it measures depends on the checkpoint, the configuration and its key alone: not on the
units before it, so that a resumed evaluation ends with the same numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lcdist.evaluate.loaded_model import LoadedModel

# Called with the tokens that were read since the last call, for the progress.
Count = Callable[[int], None]


@dataclass(frozen=True)
class Unit:
    """A piece of a part.

    Attributes:
        key: names it, on one line; the same in every evaluation of the same question.
        work: tokens that measuring it reads or generates, by which progress is counted.
    """

    key: str
    work: int


class Part(Protocol):
    """One part of an evaluation, of one loaded model."""

    def units(self) -> list[Unit]:
        """Return the units in the order in which they are measured; the same on every rank."""
        ...

    def measure(self, key: str, count: Count) -> dict[str, Any]:
        """Measure one unit; all ranks call it, and all return the same.

        Args:
            key: of the unit.
            count: called with the tokens that are read, `work` in total.

        Returns:
            What JSON can hold, numbers that are not finite included.
        """
        ...

    def summary(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the figures, with confidence intervals, from what every unit measured, by key.

        JSON without NaN and infinity: `lcdist.utils.intervals.finite` makes them None.
        """
        ...


@dataclass(frozen=True)
class PartKind:
    """A part that `evaluate.measure` can name.

    Attributes:
        name: the word.
        open: prepares the part for a model. Raises ValueError if the configuration, the text or the
            model does not fit; all ranks find the same.
        version: raised when the same key would measure something else than before.
    """

    name: str
    open: Callable[[LoadedModel], Part]
    version: int = 1

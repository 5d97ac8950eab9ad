"""Loss by position: whether a token is predicted better the more text stands before it.

Windows of the longest length are cut into bins of equally many positions. The mean loss of a bin
falls with its position as long as the model uses what it reads; where the context ends that the
model can use, it stays level or rises. The interval of a bin is that of a ratio over windows
(`lcdist.utils.intervals`). Nothing is drawn at random.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.evaluate.parts import Count, PartKind, Unit
from lcdist.evaluate.text import Windows, stretches
from lcdist.utils.intervals import finite, mean_interval


class LossByPosition:
    """The part "position". A unit is one window of the longest length a data-parallel rank.

    Measured: "windows", for each window and bin [scored tokens, their nats].
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded, asked = loaded, loaded.plan.config.evaluate
        self.length = max(asked.lengths)
        count = min(asked.bins, self.length)
        self.borders = [round(self.length * i / count) for i in range(count + 1)]
        self._starts = stretches(loaded.text, self.length, self.length * loaded.mesh.dp_size)

    def units(self) -> list[Unit]:
        """Return one unit for each stretch of the text."""
        return [Unit(key, self.length * len(starts)) for key, starts in self._starts.items()]

    def measure(self, key: str, count: Count) -> dict[str, Any]:
        """Return the scored tokens and nats of each window and bin."""
        loaded = self.loaded
        vocab_size = loaded.plan.config.model.vocab_size
        windows = Windows(loaded.text, self.length, vocab_size, self._starts[key])
        losses, scored = loaded.losses(windows, count), windows.scored()
        losses = losses.masked_fill(~scored, 0.0)
        bins = [
            (scored[:, low:high].sum(1).tolist(), losses[:, low:high].sum(1).tolist())
            for low, high in pairwise(self.borders)
        ]
        return {
            "windows": [[[n[row], x[row]] for n, x in bins] for row in range(windows.count)],
        }

    def summary(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the mean loss of each bin with its interval.

        first, last: the numbers of tokens before a bin's tokens, counted in their window.
        """
        windows = [window for key in self._starts for window in measured[key]["windows"]]
        found: dict[str, list[Any]] = {"loss": [], "interval": [], "scored": []}
        for of_bin in zip(*windows, strict=True):
            tokens, nats = zip(*of_bin, strict=True)
            mean, interval = mean_interval(tokens, nats)
            found["loss"].append(finite(mean))
            found["interval"].append(interval)
            found["scored"].append(sum(tokens))
        first, last = [low + 1 for low in self.borders[:-1]], self.borders[1:]
        return {
            **{"length": self.length, "windows": len(windows), "first": first, "last": last},
            **found,
        }


POSITION = PartKind("position", LossByPosition)

"""Perplexity by length: score the same held-out text in windows of several lengths.

The text is the same at all lengths, so longer windows improve the score only of a model that uses
its context. Most models fail beyond their training length.

The interval of a perplexity is exp of the 95 % interval of the mean loss, from the standard error
of a ratio: nats over tokens, summed over stretches of text as long as the longest window
(`lcdist.utils.intervals`). Nothing is drawn at random.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.evaluate.parts import Count, PartKind, Unit
from lcdist.evaluate.text import Windows, stretches
from lcdist.utils.intervals import exp_interval, finite, mean_interval, perplexity_of


@dataclass(frozen=True)
class Score:
    """Result at one length.

    length: of the windows, in tokens.
    tokens: number of scored tokens.
    loss: nats per token.
    """

    length: int
    tokens: int
    loss: float

    @property
    def perplexity(self) -> float:
        """exp(loss), with the loss limited to 700 so that it does not overflow."""
        return perplexity_of(self.loss)


class Perplexity:
    """The part "perplexity". A unit is the windows of one length in a stretch of the text.

    Measured: "windows", a list of [scored tokens, their nats].
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.lengths = sorted(loaded.plan.config.evaluate.lengths)
        # All data-parallel ranks have a window of the longest length in every unit.
        stretch = self.lengths[-1] * loaded.mesh.dp_size
        self._starts: dict[str, tuple[int, list[int]]] = {}
        for length in self.lengths:
            for name, starts in stretches(loaded.text, length, stretch).items():
                self._starts[f"length {length}, {name}"] = length, starts

    def units(self) -> list[Unit]:
        """Return one unit for each length and stretch."""
        return [Unit(k, length * len(starts)) for k, (length, starts) in self._starts.items()]

    def measure(self, key: str, count: Count) -> dict[str, Any]:
        """Return the scored tokens and nats of each window of a unit."""
        length, starts = self._starts[key]
        loaded = self.loaded
        windows = Windows(loaded.text, length, loaded.plan.config.model.vocab_size, starts)
        losses, scored = loaded.losses(windows, count), windows.scored()
        # Not a product: a loss that is not finite counts only where it is scored.
        nats = losses.masked_fill(~scored, 0.0).sum(1)
        return {
            "windows": [[n, x] for n, x in zip(scored.sum(1).tolist(), nats.tolist(), strict=True)]
        }

    def summary(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the perplexity at each length with its interval.

        stretches: for each length and stretch [scored tokens, their nats], by which two evaluations
        of the same text are compared. text: tells whether it is the same.
        """
        names = ("perplexity", "interval", "scored", "loss", "stretches")
        found: dict[str, list[Any]] = {name: [] for name in names}
        for length in self.lengths:
            tokens, nats = self._by_stretch(length, measured)
            mean, interval = mean_interval(tokens, nats)
            score = Score(length, sum(tokens), mean)
            found["perplexity"].append(finite(score.perplexity))
            found["interval"].append(exp_interval(interval))
            found["scored"].append(score.tokens)
            found["loss"].append(finite(mean))
            pairs = zip(tokens, map(finite, nats), strict=True)
            found["stretches"].append([list(pair) for pair in pairs])
        text = self.loaded.text
        return {"lengths": self.lengths, **found, "joined": text.joined, "text": text.digest}

    def _by_stretch(
        self, length: int, measured: Mapping[str, dict[str, Any]]
    ) -> tuple[list[int], list[float]]:
        """Return scored tokens and nats of each stretch as long as the longest window."""
        tokens, nats = dict[int, int](), dict[int, float]()
        for key, (of_length, starts) in self._starts.items():
            if of_length != length:
                continue
            for start, (scored, sum_of_window) in zip(
                starts, measured[key]["windows"], strict=True
            ):
                stretch = start // self.lengths[-1]
                tokens[stretch] = tokens.get(stretch, 0) + scored
                nats[stretch] = nats.get(stretch, 0.0) + sum_of_window
        return list(tokens.values()), list(nats.values())


PERPLEXITY = PartKind("perplexity", Perplexity)

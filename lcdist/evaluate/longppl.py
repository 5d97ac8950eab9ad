"""LongPPL: the perplexity of the tokens that long context helps to predict (arXiv:2410.23771).

A token x is a key token if, in nats,

    loss(x | short context) - loss(x | long context) > evaluate.key_gain
    loss(x | long context) < evaluate.key_loss

for the model that marks: the evaluated one, or the checkpoint `evaluate.marker`. These are the
paper's LSD > alpha and LCL > beta with alpha = key_gain and beta = -key_loss. The long context is
all of the window before the token. Short contexts slide, as in the authors' code: the tokens from
`short_context` on are taken in groups of `short_step`, and the context of a group begins
`short_context` tokens before it. The first `short_context` tokens of a window cannot be key tokens.

LongPPL is exp of the mean loss of the key tokens, given long context. Its interval is that of a
ratio over windows (`lcdist.utils.intervals`). Nothing is drawn at random.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lcdist.config.evaluate import EvaluateConfig
from lcdist.evaluate.loaded_model import LoadedModel
from lcdist.evaluate.parts import Count, PartKind, Unit
from lcdist.evaluate.text import Text, Windows, stretches
from lcdist.utils.intervals import exp_interval, finite, mean_interval, perplexity_of


class KeyTokens:
    """Key tokens of windows of the longest length, by one model.

    Measured: for each window "key", the places of its key tokens, and "not_finite", the number of
    tokens that could be none because a loss was not finite.
    """

    def __init__(self, loaded: LoadedModel, text: Text, asked: EvaluateConfig) -> None:
        self.loaded, self.text, self.asked = loaded, text, asked
        self.length = max(asked.lengths)
        self._starts = stretches(text, self.length, self.length * loaded.mesh.dp_size)

    def units(self) -> list[Unit]:
        """Return one unit for each stretch of the text."""
        one = self.length + self.short_work
        return [Unit(key, one * len(starts)) for key, starts in self._starts.items()]

    def windows(self, key: str) -> Windows:
        """Return the windows of a unit."""
        return self._windows(self.length, self._starts[key])

    def measure(self, key: str, count: Count) -> dict[str, Any]:
        """Return the key tokens of each window."""
        windows = self.windows(key)
        is_key, not_finite = self.find(windows, self.loaded.losses(windows, count), count)
        return {
            "key": [row.nonzero().flatten().tolist() for row in is_key],
            "not_finite": not_finite.tolist(),
        }

    def summary(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return the number of key tokens; LongPPL has the figures."""
        return {"key": sum(len(row) for each in measured.values() for row in each["key"])}

    def find(self, windows: Windows, long: Tensor, count: Count) -> tuple[Tensor, Tensor]:
        """Find the key tokens of windows.

        Args:
            windows: the text.
            long: the loss of each token, given long context: `[windows, length]`.
            count: called with the tokens that are read.

        Returns:
            Which tokens are key tokens, bool `[windows, length]`; and the number of tokens whose
            losses are not finite, `[windows]`.
        """
        short = torch.full_like(long, math.nan)
        for first, tokens in self._groups():
            length = self.asked.short_context + tokens - 1
            starts = [start + first - self.asked.short_context for start in windows.starts]
            losses = self.loaded.losses(self._windows(length, starts), count)
            # Place i of a window has the loss of token i + 1.
            short[:, first - 1 : first - 1 + tokens] = losses[:, -tokens:]
        could_be = windows.scored() & self.in_reach()
        is_key = (short - long > self.asked.key_gain) & (long < self.asked.key_loss) & could_be
        return is_key, (could_be & ~(short.isfinite() & long.isfinite())).sum(1)

    def in_reach(self) -> Tensor:
        """Return at which places of a window key tokens can be: bool `[length]`."""
        places = torch.arange(self.length)
        # A window's text is its tokens: the one after the last is the next window's.
        return (places >= self.asked.short_context - 1) & (places < self.length - 1)

    @property
    def short_work(self) -> int:
        """Tokens that are read again with short context, of each window."""
        return sum(self.asked.short_context + tokens - 1 for _, tokens in self._groups())

    def _groups(self) -> list[tuple[int, int]]:
        """Return the first token of each group with the same beginning of context, and its size."""
        firsts = range(self.asked.short_context, self.length, self.asked.short_step)
        return [(first, min(self.asked.short_step, self.length - first)) for first in firsts]

    def _windows(self, length: int, starts: list[int]) -> Windows:
        return Windows(self.text, length, self.loaded.plan.config.model.vocab_size, starts)


class LongPpl:
    """The part "longppl". A unit is one window of the longest length a data-parallel rank.

    Measured: for each window "key", [key tokens, their nats]; "all", the same of all its tokens;
    "in_reach", the number of tokens that could be key tokens; and "not_finite", as of `KeyTokens`.
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.tokens = KeyTokens(loaded, loaded.text, loaded.plan.config.evaluate)

    def units(self) -> list[Unit]:
        """Return one unit for each stretch of the text."""
        skipped = 0 if self.loaded.marks is None else self.tokens.short_work
        one = self.tokens.length + self.tokens.short_work
        return [
            Unit(unit.key, unit.work - unit.work // one * skipped) for unit in self.tokens.units()
        ]

    def measure(self, key: str, count: Count) -> dict[str, Any]:
        """Return the nats of all tokens and of the key tokens of each window."""
        windows = self.tokens.windows(key)
        losses = self.loaded.losses(windows, count)
        if self.loaded.marks is None:
            is_key, not_finite = self.tokens.find(windows, losses, count)
            lost = not_finite.tolist()
        else:
            marks = self.loaded.marks[key]
            is_key, lost = torch.zeros_like(losses, dtype=torch.bool), list(marks["not_finite"])
            for row, places in enumerate(marks["key"]):
                is_key[row, torch.tensor(places, dtype=torch.int64)] = True
        scored = windows.scored()
        scored[:, -1] = False
        in_reach = (scored & self.tokens.in_reach()).sum(1)
        return {
            "key": _sums(losses, is_key),
            "all": _sums(losses, scored),
            "in_reach": in_reach.tolist(),
            "not_finite": lost,
        }

    def summary(self, measured: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
        """Return LongPPL with its interval; None without key tokens or if a loss is not finite."""
        found = [measured[unit.key] for unit in self.tokens.units()]
        (key, longppl, interval), (count, perplexity, of_all) = (
            _perplexity([pair for each in found for pair in each[name]]) for name in ("key", "all")
        )
        in_reach, lost = (
            sum(sum(each[name]) for each in found) for name in ("in_reach", "not_finite")
        )
        asked = self.tokens.asked
        return {
            "length": self.tokens.length,
            "longppl": None if lost else longppl,
            "interval": None if lost else interval,
            "key_tokens": key,
            "in_reach": in_reach,
            "key_share": key / in_reach if in_reach else None,
            "not_finite": lost,
            "perplexity": perplexity,
            "perplexity_interval": of_all,
            "scored": count,
            "marker": asked.marker,
            **{
                k: getattr(asked, k)
                for k in ("short_context", "short_step", "key_gain", "key_loss")
            },
        }


def _sums(losses: Tensor, chosen: Tensor) -> list[list[Any]]:
    """Return [number, sum] of the chosen losses of each row."""
    sums = losses.masked_fill(~chosen, 0.0).sum(1).tolist()
    return [[n, x] for n, x in zip(chosen.sum(1).tolist(), sums, strict=True)]


def _perplexity(pairs: list[list[Any]]) -> tuple[int, float | None, list[float] | None]:
    """Return the number of tokens, their perplexity and its interval, from pairs of `_sums`."""
    tokens, nats = [n for n, _ in pairs], [x for _, x in pairs]
    mean, interval = mean_interval(tokens, nats)
    return sum(tokens), finite(perplexity_of(mean)), exp_interval(interval)


LONGPPL = PartKind("longppl", LongPpl)

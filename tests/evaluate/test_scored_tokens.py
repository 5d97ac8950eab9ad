"""Which losses count: those of scored tokens; one that is not finite is never left out."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.config.evaluate import EvaluateConfig
from lcdist.evaluate.longppl import LongPpl
from lcdist.evaluate.perplexity import Perplexity
from lcdist.evaluate.position import LossByPosition
from lcdist.evaluate.text import Text, Windows

LENGTH, COUNT = 12, 4


def part_of(kind: Any, losses: Tensor, unscored: Tensor, short: float = 9.0) -> dict[str, Any]:
    """Return what a part finds in windows with these losses of every token of the text."""
    asked = EvaluateConfig(
        lengths=(4, LENGTH), bins=3, short_context=4, short_step=4, key_gain=2.0, key_loss=2.0
    )

    def read(windows: Windows, count: Any) -> Tensor:
        starts = torch.tensor([*windows.starts])[:, None] + torch.arange(windows.seqlen)
        found = losses[starts]
        return found if windows.seqlen in (4, LENGTH) else torch.full_like(found, short)

    plan = SimpleNamespace(
        config=SimpleNamespace(evaluate=asked, model=SimpleNamespace(vocab_size=9))
    )
    text = Text(torch.zeros(LENGTH * COUNT + 1, dtype=torch.int64), unscored, False)
    loaded = SimpleNamespace(
        losses=read, plan=plan, text=text, mesh=SimpleNamespace(dp_size=1), marks=None
    )
    part = kind(loaded)
    return part.summary({u.key: part.measure(u.key, lambda tokens: None) for u in part.units()})


def made() -> tuple[Tensor, Tensor]:
    """Return losses after each token, and which tokens are unscored: about half, as in answers."""
    generator = torch.Generator().manual_seed(1)
    losses = torch.rand(LENGTH * COUNT, generator=generator, dtype=torch.float64) + 1
    return losses, torch.rand(LENGTH * COUNT + 1, generator=generator) < 0.5


def test_only_scored_tokens_count() -> None:
    losses, unscored = made()
    # What is not scored may be anything.
    losses[unscored[1:]] = math.nan
    chosen = losses[~unscored[1:]]
    perplexity = part_of(Perplexity, losses, unscored)
    assert perplexity["scored"] == [len(chosen)] * 2
    assert perplexity["perplexity"] == pytest.approx([math.exp(chosen.mean())] * 2)
    position = part_of(LossByPosition, losses, unscored)
    assert sum(position["scored"]) == len(chosen)
    total = sum(n * x for n, x in zip(position["scored"], position["loss"], strict=True))
    assert total == pytest.approx(chosen.sum().item())
    longppl = part_of(LongPpl, losses, unscored)
    rows = losses.view(COUNT, LENGTH)
    scored = ~unscored[1:].view(COUNT, LENGTH)
    key = rows[:, 3:-1][scored[:, 3:-1] & (rows[:, 3:-1] < 2)]
    assert longppl["key_tokens"] == longppl["in_reach"] == len(key)
    assert longppl["longppl"] == pytest.approx(math.exp(key.mean())) and not longppl["not_finite"]


def test_the_interval_of_a_perplexity_is_that_of_stretches_at_every_length() -> None:
    losses, unscored = made()
    found = part_of(Perplexity, losses, unscored)
    scored = ~unscored[1:].view(COUNT, LENGTH)
    tokens, nats = scored.sum(1), (losses.view(COUNT, LENGTH) * scored).sum(1)
    mean = (nats.sum() / tokens.sum()).item()
    squares = ((nats - mean * tokens) ** 2).sum().item()
    half = 3.18245 * math.sqrt(COUNT / (COUNT - 1) * squares) / tokens.sum().item()
    expected = [math.exp(mean - half), math.exp(mean + half)]
    assert found["interval"] == [pytest.approx(expected, rel=1e-5)] * 2
    for stretches in found["stretches"]:
        assert [n for n, _ in stretches] == tokens.tolist()
        assert [x for _, x in stretches] == pytest.approx(nats.tolist())
    other = part_of(Perplexity, losses, ~unscored)
    assert found["text"] != other["text"] and len(found["text"]) == 64


def test_thresholds_are_strict() -> None:
    losses, scored = torch.full((LENGTH * COUNT,), 1.0), torch.zeros(LENGTH * COUNT + 1).bool()
    assert part_of(LongPpl, losses.double(), scored, short=3.0)["key_tokens"] == 0
    assert part_of(LongPpl, losses.double(), scored, short=3.001)["key_tokens"] == 8 * COUNT
    assert part_of(LongPpl, 2 * losses.double(), scored)["key_tokens"] == 0


def test_without_a_key_token_there_is_no_figure() -> None:
    losses, unscored = made()
    found = part_of(LongPpl, losses, unscored, short=1.0)
    assert (found["key_tokens"], found["longppl"], found["interval"]) == (0, None, None)
    assert found["key_share"] == 0 and found["perplexity"] > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_scored_loss_that_is_not_finite_leaves_no_figure(bad: float) -> None:
    losses, unscored = made()
    place = LENGTH + 6
    losses[place], unscored[place + 1] = bad, False
    perplexity = part_of(Perplexity, losses, unscored)
    assert perplexity["perplexity"] == [None, None]
    assert perplexity["loss"] == [None, None] and perplexity["interval"] == [None, None]
    position = part_of(LossByPosition, losses, unscored)
    assert [loss is None for loss in position["loss"]] == [False, True, False]
    longppl = part_of(LongPpl, losses, unscored)
    assert longppl["not_finite"] == 1 and longppl["longppl"] is None
    assert part_of(LongPpl, made()[0], unscored, short=bad)["longppl"] is None

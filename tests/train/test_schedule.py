"""The learning rate by golden values, and the laws of every schedule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcdist.config.schema import OptimConfig
from lcdist.train.schedule import learning_rate


def rates(steps: int, **options: object) -> list[float]:
    optim = OptimConfig(lr=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(optim, step, steps) for step in range(steps)]


def test_cosine_by_hand() -> None:
    # Two steps of warmup, then a quarter of a half turn a step: cos of 45, 90, 135, 180 degrees.
    half = math.sqrt(0.5)
    expected = [0.5, 1.0, 0.2 + 0.4 * (1 + half), 0.6, 0.2 + 0.4 * (1 - half), 0.2]
    assert rates(6, schedule="cosine", min_lr=0.2, warmup_steps=2) == pytest.approx(expected)


def test_wsd_by_hand() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 0.7, 0.4, 0.1]
    found = rates(9, schedule="wsd", min_lr=0.1, warmup_steps=4, decay_steps=3)
    assert found == pytest.approx(expected)


def test_constant_by_hand() -> None:
    assert rates(4, schedule="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0]


def test_no_warmup_starts_next_to_the_top() -> None:
    assert rates(4, schedule="constant") == [1.0] * 4
    assert rates(1, schedule="cosine") == [0.0]


@st.composite
def schedules(draw: st.DrawFn) -> tuple[int, OptimConfig]:
    steps = draw(st.integers(1, 300))
    warmup = draw(st.integers(0, steps))
    kind = draw(st.sampled_from(["cosine", "wsd", "constant"]))
    decay = draw(st.integers(1, max(1, steps - warmup))) if kind == "wsd" else 0
    lr = draw(st.floats(1e-6, 1.0))
    low = draw(st.floats(0, 1)) * lr
    optim = OptimConfig(lr=lr, min_lr=low, schedule=kind, warmup_steps=warmup, decay_steps=decay)
    return steps, optim


@given(schedules())
def test_laws(drawn: tuple[int, OptimConfig]) -> None:
    """Up in equal steps to lr exactly, never up again, at min_lr in the last step, no jumps."""
    steps, optim = drawn
    found = [learning_rate(optim, step, steps) for step in range(steps)]
    warmup = optim.warmup_steps
    assert found[:warmup] == pytest.approx([optim.lr * (i + 1) / warmup for i in range(warmup)])
    rest = found[warmup:]
    assert all(a >= b - 1e-12 for a, b in zip(rest, rest[1:], strict=False))
    if rest and optim.schedule != "constant":
        assert rest[-1] == pytest.approx(optim.min_lr, abs=1e-12)
    span = optim.lr - optim.min_lr
    # The steepest of each: a half turn of cosine has slope pi/2, a line 1, over so many steps.
    steepest = {
        "cosine": span * math.pi / 2 / max(1, steps - warmup),
        "wsd": span / max(1, optim.decay_steps),
        "constant": 0.0,
    }[optim.schedule]
    top = [optim.lr, *rest]
    if warmup:
        assert all(a - b <= steepest + 1e-12 for a, b in zip(top, top[1:], strict=False))

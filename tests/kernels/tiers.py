"""Test parameters in two tiers: a covering set by default, the full product as `exhaustive`."""

from collections.abc import Collection, Sequence
from itertools import product
from typing import Any

import pytest

Cases = Sequence[tuple[Any, ...]]


def tiered(cases: Cases, default: Collection[int]) -> list[Any]:
    """Return all cases as parameters; those whose number is not in `default` are exhaustive."""
    assert default and all(0 <= number < len(cases) for number in default)
    return [
        pytest.param(*case, marks=() if number in default else pytest.mark.exhaustive)
        for number, case in enumerate(cases)
    ]


def covering(*axes: Cases, free: int = 1) -> list[Any]:
    """Return the product of `axes`, each a list of tuples of arguments, as parameters.

    By default run all combinations of the first `free` axes (1 or 2), while the values of the other
    axes take turns; the rest of the product is exhaustive.
    """
    cases, default = [], []
    for numbers in product(*(range(len(axis)) for axis in axes)):
        first, second = numbers[0], numbers[1] if free == 2 else 0
        turns = (
            (first + axis * second) % len(axes[axis]) == numbers[axis]
            for axis in range(free, len(axes))
        )
        if all(turns):
            default.append(len(cases))
        cases.append(sum((tuple(axis[n]) for axis, n in zip(axes, numbers, strict=True)), ()))
    return tiered(cases, default)


def one(values: Sequence[Any]) -> list[tuple[Any]]:
    """Return values as an axis of one argument."""
    return [(value,) for value in values]

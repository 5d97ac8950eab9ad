"""The table of parts, what the configuration can name, and the intervals of what they measure."""

import math
import typing

import pytest

from lcdist.config.evaluate import Measure
from lcdist.evaluate.registry import PART_KINDS
from lcdist.report.evaluation_sections import SECTIONS, printed_tables, sections
from lcdist.utils.intervals import fraction_interval, mean_interval, student_t


def test_every_part_that_can_be_named_has_code_and_a_section() -> None:
    assert typing.get_args(Measure) == tuple(PART_KINDS) == tuple(SECTIONS)
    assert all(kind.name == name for name, kind in PART_KINDS.items())


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (7, 2.36462), (30, 2.04227), (10**6, 1.95996)],
)
def test_student_t_equals_its_table(degrees: int, expected: float) -> None:
    assert student_t(degrees) == pytest.approx(expected, rel=2e-5)


def test_the_interval_of_equal_weights_is_that_of_a_mean() -> None:
    ratio, interval = mean_interval([10, 10, 10, 10], [10.0, 20.0, 30.0, 40.0])
    half = 3.18245 * math.sqrt(5 / 3) / 2
    assert ratio == 2.5
    assert interval == pytest.approx([2.5 - half, 2.5 + half], rel=1e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    import random

    draw, hits = random.Random(0), 0
    for _ in range(2000):
        weights = [draw.randint(1, 9) for _ in range(12)]
        totals = [w * 3.0 + draw.gauss(0, 1) * math.sqrt(w) for w in weights]
        _, interval = mean_interval(weights, totals)
        assert interval is not None
        hits += interval[0] <= 3.0 <= interval[1]
    assert 0.93 < hits / 2000 < 0.97


def test_pieces_without_weight_say_nothing_and_one_piece_has_no_interval() -> None:
    assert mean_interval([4, 0, 4], [4.0, 0.0, 8.0]) == mean_interval([4, 4], [4.0, 8.0])
    assert mean_interval([4, 0], [8.0, 0.0]) == (2.0, None)
    ratio, interval = mean_interval([], [])
    assert math.isnan(ratio) and interval is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_left_out(bad: float) -> None:
    ratio, interval = mean_interval([4, 4], [bad, 8.0])
    assert not math.isfinite(ratio) and interval is None


def test_intervals_of_fractions() -> None:
    # Wilson (1927), as statistics packages print it.
    assert fraction_interval(45, 50) == pytest.approx([0.78640, 0.95652], abs=1e-4)
    low, high = fraction_interval(0, 50) or []
    assert low == 0 and high == pytest.approx(0.0714, abs=1e-3)
    low, high = fraction_interval(50, 50) or []
    assert low == pytest.approx(0.9286, abs=1e-3) and high == 1
    assert fraction_interval(0, 0) is None


def test_a_part_of_a_newer_version_is_shown_plainly() -> None:
    newer = {"telepathy": {"score": 0.5, "by": {"length": [1, 2]}}}
    [table] = printed_tables(newer)
    assert ("score", "0.5") in table.rows and ("by.length", "1, 2") in table.rows
    [section] = sections({"a": newer, "b": {}})
    assert section.title == "telepathy" and section.tables[0].rows == table.rows

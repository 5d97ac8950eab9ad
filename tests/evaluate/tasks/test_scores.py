"""Scores of predictions: equal to the released program's, and what stands between its lines."""

import json
from pathlib import Path

import pytest

from lcdist.evaluate.tasks.scores import (
    effective_length,
    first_number_matches,
    string_match_all,
)

RELEASED = json.loads(Path(__file__).with_name("released.json").read_text())


@pytest.mark.parametrize("case", RELEASED["scores"], ids=lambda case: repr(case["prediction"]))
def test_scores_equal_the_released_ones(case: dict) -> None:
    asked = case["prediction"], case["references"]
    assert round(100 * string_match_all(*asked), 2) == case["all"]


def test_a_share_of_the_references() -> None:
    prediction = " 1. apple 2. Pear\n3. plum"
    assert string_match_all(prediction, ["apple", "PEAR", "fig", "grape"]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        (" 12345.", 1),
        (" 12345\nThe sky is blue 99", 1),
        (" 123456", 0),
        (" 1234", 0),
        (" 54321 12345", 0),
        ("", 0),
        ("the pass key", 0),
    ],
)
def test_a_passkey_is_the_first_number(prediction: str, score: float) -> None:
    assert first_number_matches(prediction, ["12345"]) == score


def test_effective_length_is_the_longest_that_reaches_the_threshold() -> None:
    averages = {4096: 95.5, 8192: 93.8, 16384: 91.6, 32768: 87.4, 65536: 84.7, 131072: 77.0}
    assert effective_length(averages) == 32768
    assert effective_length(averages, threshold=84.7) == 65536
    assert effective_length({4096: 85.6}) == 4096 and effective_length({4096: 85.59}) is None

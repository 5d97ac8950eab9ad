"""Rules of claims, with made-up figures: what is reproduced, what is not, what is not decided."""

import math
from collections.abc import Mapping

import pytest

from lcdist.claims import rules
from lcdist.claims.claim import Claim, Figure, Measured, Reading, Training, decide
from lcdist.claims.jobs import ADAPTED, all_jobs, jobs_named
from lcdist.claims.registry import CLAIMS
from lcdist.claims.tables import loss_at, reaches

N = 100


# Pieces of the text, far easier and harder than its mean for every model.
HARD = (-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0)


def figure(value: float, half: float = 0.1) -> Figure:
    return Figure(value, (value - half, value + half))


def pieces(value: float, own: float) -> list[tuple[int, float]]:
    """Return pieces of a text of perplexity `value`; `own`: how a model differs on each, in %."""
    signs = (1, -1, -1, 1, 1, -1, -1, 1)
    return [
        (N, N * (math.log(value) + hard + sign * own / 100))
        for hard, sign in zip(HARD, signs, strict=True)
    ]


def reading(
    perplexity: Mapping[int, float], passkey: Mapping[int, float] | None = None, half: float = 0.1
) -> Reading:
    """Return a reading; keys are multiples of the training length."""
    return Reading(
        {times * N: figure(value, half) for times, value in perplexity.items()},
        {times * N: figure(value, 0.1) for times, value in (passkey or {}).items()},
        pieces={times * N: pieces(value, half * times) for times, value in perplexity.items()},
    )


def measured(
    readings: Mapping[str, Reading] | None = None, *, decides: bool = True, **more: Reading
) -> Measured:
    """Return readings of models whose text has a unigram perplexity of 200."""
    return Measured(N, 200.0, decides, {**(readings or {}), **more})


@pytest.mark.parametrize(
    ("new", "old", "word"),
    [
        ({1: 10, 16: 12}, {1: 10, 16: 300}, "reproduced"),
        ({1: 10, 16: 60}, {1: 10, 16: 300}, "not reproduced"),
        # The other one does not diverge: nothing was shown.
        ({1: 10, 16: 12}, {1: 10, 16: 50}, "not decided"),
        # Neither model has learned anything: 200 tokens' frequencies give 200.
        ({1: 150, 16: 160}, {1: 150, 16: 9000}, "not decided"),
        # The baseline is far behind the method.
        ({1: 10, 16: 12}, {1: 20, 16: 900}, "not decided"),
        # The method is far behind the baseline.
        ({1: 20, 16: 21}, {1: 10, 16: 300}, "not decided"),
        # A loss that is not finite is the worst divergence.
        ({1: 10, 16: 12}, {1: 10}, "reproduced"),
        ({1: 10}, {1: 10, 16: 300}, "not reproduced"),
    ],
)
def test_steady_where_the_other_diverges(
    new: dict[int, float], old: dict[int, float], word: str
) -> None:
    rule = rules.steady_where_other_diverges("new", "old", 16, 1.5)
    assert rule(measured(new=reading(new), old=reading(old))).word == word


@pytest.mark.parametrize(
    ("new", "old", "word"),
    [
        ({1: 10, 16: 20}, {1: 10, 16: 40}, "reproduced"),
        ({1: 10, 16: 40}, {1: 10, 16: 20}, "not reproduced"),
        ({1: 10, 16: 20}, {1: 10, 16: 20.3}, "not decided"),
        ({1: 10, 16: 20}, {1: 14, 16: 80}, "not decided"),
    ],
)
def test_grows_less(new: dict[int, float], old: dict[int, float], word: str) -> None:
    found = measured(new=reading(new), old=reading(old, half=2.0))
    assert rules.grows_less("new", "old", 16)(found).word == word


def test_lower_and_as_good_compare_the_same_length() -> None:
    found = measured(new=reading({1: 10, 4: 8}), old=reading({1: 10, 4: 9}))
    assert rules.lower("new", "old", 4)(found).word == "reproduced"
    assert rules.lower("old", "new", 4)(found).word == "not reproduced"
    close = measured(new=reading({1: 10, 4: 8}, half=3), old=reading({1: 10.1, 4: 9}, half=1))
    assert rules.lower("new", "old", 1)(close).word == "not decided"
    assert rules.as_good("new", "old", 1, 1.0)(close).word == "not decided"
    assert rules.as_good("old", "new", 4, 1.05)(found).word == "not reproduced"
    assert rules.as_good("old", "new", 1, 1.05)(found).word == "reproduced"
    # What the models were extended from has not converged.
    poor = measured(found.readings, base=reading({1: 90}))
    assert rules.lower("new", "old", 4, converge=["base"])(poor).word == "not decided"


@pytest.mark.parametrize(
    ("before", "word"),
    [
        # Worse at its own length than what it was extended from, as an interpolation is.
        ({1: 10, 4: 20}, "reproduced"),
        # Not better at the new length: the extension taught nothing.
        ({1: 10, 4: 11}, "not decided"),
        ({1: 90, 4: 200}, "not decided"),
    ],
)
def test_an_extension_has_converged_if_it_improves_on_its_start(
    before: dict[int, float], word: str
) -> None:
    found = measured(
        start=reading(before), new=reading({1: 14, 4: 10}), old=reading({1: 14, 4: 12})
    )
    lower = rules.lower("new", "old", 4, start="start")(found)
    as_good = rules.as_good("new", "old", 4, 1.05, start="start")(found)
    assert lower.word == as_good.word == word


@pytest.mark.parametrize(
    ("new", "old", "word"),
    [
        ({1: 1.0, 2: 0.9}, {1: 1.0, 2: 0.3}, "reproduced"),
        ({1: 1.0, 2: 0.3}, {1: 1.0, 2: 0.9}, "not reproduced"),
        ({1: 1.0, 2: 0.5}, {1: 1.0, 2: 0.4}, "not decided"),
        # A baseline that finds nothing at its own length has not learned the task.
        ({1: 1.0, 2: 0.9}, {1: 0.2, 2: 0.0}, "not decided"),
        ({1: 1.0, 2: 0.9}, {}, "not decided"),
    ],
)
def test_finds_more(new: dict[int, float], old: dict[int, float], word: str) -> None:
    found = measured(new=reading({1: 10}, new), old=reading({1: 10}, old))
    assert rules.finds_more("new", "old", (2, 4))(found).word == word


def test_finds_asks_for_a_share_at_a_length() -> None:
    found = measured(a=reading({1: 10}, {1: 1.0, 16: 0.95}), b=reading({1: 10}, {1: 1.0, 16: 0.1}))
    assert rules.finds("a", 16, 0.8)(found).word == "reproduced"
    assert rules.finds("b", 16, 0.8)(found).word == "not reproduced"
    assert rules.finds("a", 32, 0.8)(found).word == "not decided"
    assert rules.steady("a", 16)(found).why.startswith("perplexity at 16x is inf")


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_no_claim_is_decided_by_models_that_learned_nothing(claim: Claim) -> None:
    lengths = {times: 190.0 * times for times in (1, 2, 4, 8, 16)}
    names = [name for name in claim.readings if name not in ("lssar-p15", "coca-slack-ntk")]
    readings = {name: reading(lengths, {1: 0.0}) for name in names}
    # The new method may be as good as it likes.
    good = reading({1: 2, 4: 2, 16: 2}, {1: 1.0, 2: 1.0, 16: 1.0})
    readings |= {name: good for name in claim.readings if name not in names}
    if not names:
        readings = {claim.readings[0]: reading(lengths, {1: 0.0})}
    assert decide(claim, measured(readings)).word == "not decided"


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_every_claim_can_be_reproduced_and_names_readings_that_jobs_make(claim: Claim) -> None:
    made = {read.name for job in all_jobs(256) for read in job.reads}
    assert set(claim.readings) <= made
    own, other = claim.readings[0], claim.readings[1:]
    best = reading({1: 10, 4: 10, 16: 10}, dict.fromkeys((1, 2, 4, 8, 16), 1.0), half=0.01)
    worse = reading(
        {1: 10.05, 4: 12, 16: 900}, {1: 1.0, 2: 0.2, 4: 0.1, 8: 0.0, 16: 0.0}, half=0.01
    )
    readings = {own: best, **dict.fromkeys(other, worse)}
    if own.startswith(ADAPTED):
        # Before the extension.
        readings["full"] = reading({1: 10, 4: 30, 16: 900}, half=0.01)
    found = measured(readings)
    assert decide(claim, found).word == "reproduced", decide(claim, found)
    assert decide(claim, measured(found.readings, decides=False)).word == "not decided"
    assert decide(claim, measured({own: best} if other else {})).word == "not decided"


def test_a_ratio_is_that_of_the_pieces_that_both_read() -> None:
    found = measured(new=reading({1: 10, 4: 20}), old=reading({1: 11, 4: 33}, half=1.0))
    own = rules.ratio(found, [("new", 4), ("old", 1)], [("old", 4), ("new", 1)])
    assert own.value == pytest.approx(20 * 11 / 33 / 10)
    # Each perplexity alone is known to a factor of three; what both find hard cancels.
    assert own.interval is not None and 1 < own.high / own.low < 1.1
    other = Reading({N: figure(10)}, pieces={N: [(N + 1, 300.0)] * len(HARD)})
    with pytest.raises(ValueError, match="new was read on other text than other"):
        rules.ratio(measured(found.readings, other=other), [("other", 1)], [("new", 1)])


def test_growth_counts_what_is_not_finite_as_infinite() -> None:
    assert rules.growth(measured(a=reading({1: 10})), "a", 2).value == math.inf


def test_jobs_come_behind_what_they_start_from() -> None:
    jobs = all_jobs(256)
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    assert all(names.index(job.start) < names.index(job.name) for job in jobs if job.start)
    assert [job.name for job in jobs_named(jobs, ["extend-flow"])] == ["full", "extend-flow"]
    with pytest.raises(ValueError, match="--only fully: there is no such job; jobs: full, "):
        jobs_named(jobs, ["fully"])


def test_budgets_say_when_a_training_has_the_loss_of_another() -> None:
    curve = tuple((100 * n, 5.0 - 0.04 * n) for n in range(1, 101))
    training = Training(curve, 1.0, 1.0)
    # Losses of the last tenth of 5,000 tokens, 4,500 to 5,000, are 3.2 to 3.0.
    assert loss_at(training, 5000) == pytest.approx(3.1)
    assert reaches(training, 3.1001) == "5,000 tokens"
    assert reaches(training, 0.5) == "not within 10,000 tokens"
    assert loss_at(Training(((4, 6.0), (8, 5.0)), 1.0, 1.0), 2) == 6.0

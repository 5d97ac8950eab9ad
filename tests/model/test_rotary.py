"""The frequencies of every scaling rule, by golden values."""

import math
from dataclasses import replace

import pytest
import torch

from lcdist.config import rope as ropes
from lcdist.model.rotary import (
    attention_factor,
    inverse_frequencies,
    make_rotary,
    rotary_by_length,
)

HEAD_DIM = 128


def test_plain_frequencies() -> None:
    theta = inverse_frequencies(ropes.RopePlain(), HEAD_DIM)
    assert theta.dtype == torch.float64 and theta.shape == (64,)
    # Places 0, 20 and 63 of base 10000: 10^(-4 i / 64).
    assert theta[0] == 1
    assert float(theta[20]) == pytest.approx(5.62341325e-2, rel=1e-8)
    assert float(theta[63]) == pytest.approx(1.15478199e-4, rel=1e-8)


@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_pi_divides_every_frequency(factor: float) -> None:
    plain = inverse_frequencies(ropes.RopePlain(base=5e5), HEAD_DIM)
    assert torch.equal(
        inverse_frequencies(ropes.RopePI(base=5e5, factor=factor), HEAD_DIM), plain / factor
    )


@pytest.mark.parametrize(("factor", "last"), [(2.0, 5.77390992e-5), (16.0, 7.21738740e-6)])
def test_pi_by_golden_values(factor: float, last: float) -> None:
    theta = inverse_frequencies(ropes.RopePI(factor=factor), HEAD_DIM)
    assert float(theta[0]) == 1 / factor
    assert float(theta[63]) == pytest.approx(last, rel=1e-8)


def test_pi_is_a_shorter_position() -> None:
    # arXiv:2306.15595, eq. 4: position m under factor s is position m / s as trained.
    x = torch.randn(1, 4, 2, 16, dtype=torch.float64)
    scaled = make_rotary(ropes.RopePI(factor=4.0), 16).rotate(x, torch.tensor([0, 4, 40, 400]))
    plain = make_rotary(ropes.RopePlain(), 16).rotate(x, torch.tensor([0, 1, 10, 100]))
    torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("factor", "base"), [(2.0, 20221.2617), (4.0, 40889.9424), (8.0, 82684.6226)]
)
def test_ntk_changes_the_base(factor: float, base: float) -> None:
    theta = inverse_frequencies(ropes.RopeNTK(factor=factor), HEAD_DIM)
    plain = inverse_frequencies(ropes.RopePlain(), HEAD_DIM)
    # theta_1 = base^(-2 / D), so the base can be read off it.
    assert float(theta[1]) ** -64 == pytest.approx(base, rel=1e-8)
    assert theta[0] == plain[0]
    assert float(theta[63]) == pytest.approx(float(plain[63]) / factor, rel=1e-12)


def at(theta: torch.Tensor, golden: dict[int, float]) -> None:
    for place, value in golden.items():
        assert float(theta[place]) == pytest.approx(value, rel=1e-8), place


def test_yarn_by_golden_values() -> None:
    rope = ropes.RopeYarn(factor=16.0, original_seqlen=4096)
    golden = {0: 1.0, 20: 5.62341325e-2, 32: 5.67307692e-3, 40: 8.81788963e-4, 63: 7.21738740e-6}
    at(inverse_frequencies(rope, HEAD_DIM), golden)
    assert attention_factor(rope) == pytest.approx(1.277259, rel=1e-6)
    twice = ropes.RopeYarn(factor=2.0, original_seqlen=4096)
    golden = {32: 7.69230769e-3, 40: 1.94601702e-3, 63: 5.77390992e-5}
    at(inverse_frequencies(twice, HEAD_DIM), golden)
    assert attention_factor(twice) == pytest.approx(1.069315, rel=1e-6)


def test_yarn_keeps_what_is_fast_and_interpolates_what_is_slow() -> None:
    rope = ropes.RopeYarn(base=1e6, factor=4.0, original_seqlen=32768)
    plain = inverse_frequencies(ropes.RopePlain(base=1e6), HEAD_DIM)
    theta = inverse_frequencies(rope, HEAD_DIM)
    # The ramp goes from feature 23 to 40.
    assert torch.equal(theta[:24], plain[:24]) and theta[24] < plain[24]
    torch.testing.assert_close(theta[40:], plain[40:] / 4, rtol=1e-15, atol=0)
    assert theta[39] > plain[39] / 4
    assert attention_factor(rope) == pytest.approx(1.138629, rel=1e-6)


def test_yarn_without_rounded_ends_and_with_a_given_factor() -> None:
    rope = ropes.RopeYarn(factor=16.0, original_seqlen=4096, truncate=False, attention_factor=1.5)
    plain = inverse_frequencies(ropes.RopePlain(), HEAD_DIM)
    # idx(32) = 20.9445 and idx(1) = 45.0269.
    ramp = (32 - 20.9445) / (45.0269 - 20.9445)
    expected = float(plain[32]) * (1 - ramp + ramp / 16)
    assert float(inverse_frequencies(rope, HEAD_DIM)[32]) == pytest.approx(expected, rel=1e-5)
    assert make_rotary(rope, HEAD_DIM).attention_factor == 1.5


def test_a_ramp_of_no_length_is_a_step() -> None:
    rope = ropes.RopeYarn(factor=4.0, original_seqlen=10**9, beta_fast=1.0, beta_slow=1.0)
    theta = inverse_frequencies(rope, 4)
    assert torch.isfinite(theta).all()


def test_llama3_by_golden_values() -> None:
    rope, plain = ropes.RopeLlama3(), inverse_frequencies(ropes.RopePlain(base=5e5), HEAD_DIM)
    theta = inverse_frequencies(rope, HEAD_DIM)
    golden = {28: 3.21144599e-3, 29: 2.16657076e-3, 32: 5.24846161e-4}
    at(theta, golden | {35: 9.55621235e-5, 63: 3.06892599e-7})
    assert torch.equal(theta[:29], plain[:29])
    torch.testing.assert_close(theta[35:], plain[35:] / 8, rtol=1e-15, atol=0)
    assert attention_factor(rope) == 1.0


def test_dynamic_grows_with_the_sequence_by_golden_values() -> None:
    rope, plain = (
        ropes.RopeDynamic(factor=2.0, original_seqlen=4096),
        inverse_frequencies(ropes.RopePlain(), HEAD_DIM),
    )
    for seqlen in (1, 4095, 4096):
        assert torch.equal(inverse_frequencies(rope, HEAD_DIM, seqlen), plain), seqlen
    theta = inverse_frequencies(rope, HEAD_DIM, 12288)
    assert float(theta[1]) ** -64 == pytest.approx(51293.7873, rel=1e-8)
    # 2 x 12288 / 4096 - 1 = 5: the last frequency is divided by it.
    assert float(theta[63]) == pytest.approx(float(plain[63]) / 5, rel=1e-12)
    assert attention_factor(rope) == 1.0


LONG = ropes.RopeLong(
    factor=16.0,
    original_seqlen=4096,
    short_factors=tuple(1.0 + i / 64 for i in range(64)),
    long_factors=tuple(1.0 + i / 4 for i in range(64)),
)


def test_longrope_has_factors_for_short_and_for_long_sequences() -> None:
    plain = inverse_frequencies(ropes.RopePlain(), HEAD_DIM)
    for seqlen, last in ((4096, 1 + 63 / 64), (4097, 1 + 63 / 4)):
        theta = inverse_frequencies(LONG, HEAD_DIM, seqlen)
        assert float(theta[0]) == 1.0
        assert float(theta[63]) == pytest.approx(float(plain[63]) / last, rel=1e-12), seqlen
    assert attention_factor(LONG) == pytest.approx(1.1547005, rel=1e-7)
    assert attention_factor(replace(LONG, attention_factor=1.25)) == 1.25
    assert attention_factor(replace(LONG, factor=1.0)) == 1.0


def test_only_what_depends_on_the_length_is_made_for_each() -> None:
    fixed = rotary_by_length(ropes.RopePI(factor=2.0), HEAD_DIM)
    assert fixed(5) is fixed(50_000)
    grown = rotary_by_length(ropes.RopeDynamic(factor=2.0, original_seqlen=10), HEAD_DIM)
    assert torch.equal(grown(10).inv_freq, inverse_frequencies(ropes.RopePlain(), HEAD_DIM))
    assert grown(3) is grown(10) and grown(11) is grown(11)
    assert not torch.equal(grown(11).inv_freq, grown(10).inv_freq) and grown(12) is not grown(11)
    two = rotary_by_length(LONG, HEAD_DIM)
    assert two(1) is two(4096) and two(4097) is two(9000) and two(4096) is not two(4097)
    for seqlen in (4096, 4097):
        assert torch.equal(two(seqlen).inv_freq, inverse_frequencies(LONG, HEAD_DIM, seqlen))


@pytest.mark.parametrize(
    "rope",
    [
        ropes.RopePlain(),
        ropes.RopeDynamic(factor=9.0, original_seqlen=4),
        replace(LONG, short_factors=(1.0,) * 64, factor=1.0),
        ropes.RopePI(factor=1.0),
        ropes.RopeNTK(factor=1.0),
        ropes.RopeYarn(original_seqlen=4096),
        ropes.RopeLlama3(base=10000.0, factor=1.0),
    ],
)
def test_factor_one_is_plain(rope: ropes.Rope) -> None:
    plain = inverse_frequencies(ropes.RopePlain(), HEAD_DIM)
    torch.testing.assert_close(inverse_frequencies(rope, HEAD_DIM), plain, rtol=1e-15, atol=0)
    assert attention_factor(rope) == 1.0


def test_smallest_head_keeps_first_and_scales_last() -> None:
    theta = inverse_frequencies(ropes.RopeNTK(base=100.0, factor=3.0), 4)
    assert theta.tolist() == pytest.approx([1.0, 0.1 / 3.0], rel=1e-14)
    assert math.isclose(float(inverse_frequencies(ropes.RopePlain(base=100.0), 4)[1]), 0.1)

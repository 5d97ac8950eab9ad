"""The frequencies of every scaling rule, by golden values."""

import math

import pytest
import torch

from lcdist.config.schema import Rope, RopeNTK, RopePI, RopePlain
from lcdist.model.rotary import inverse_frequencies, make_rotary

HEAD_DIM = 128


def test_plain_frequencies() -> None:
    theta = inverse_frequencies(RopePlain(), HEAD_DIM)
    assert theta.dtype == torch.float64 and theta.shape == (64,)
    # Places 0, 20 and 63 of base 10000: 10^(-4 i / 64).
    assert theta[0] == 1
    assert float(theta[20]) == pytest.approx(5.62341325e-2, rel=1e-8)
    assert float(theta[63]) == pytest.approx(1.15478199e-4, rel=1e-8)


@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_pi_divides_every_frequency(factor: float) -> None:
    plain = inverse_frequencies(RopePlain(base=5e5), HEAD_DIM)
    assert torch.equal(
        inverse_frequencies(RopePI(base=5e5, factor=factor), HEAD_DIM), plain / factor
    )


@pytest.mark.parametrize(("factor", "last"), [(2.0, 5.77390992e-5), (16.0, 7.21738740e-6)])
def test_pi_by_golden_values(factor: float, last: float) -> None:
    theta = inverse_frequencies(RopePI(factor=factor), HEAD_DIM)
    assert float(theta[0]) == 1 / factor
    assert float(theta[63]) == pytest.approx(last, rel=1e-8)


def test_pi_is_a_shorter_position() -> None:
    # arXiv:2306.15595, eq. 4: position m under factor s is position m / s as trained.
    x = torch.randn(1, 4, 2, 16, dtype=torch.float64)
    scaled = make_rotary(RopePI(factor=4.0), 16).rotate(x, torch.tensor([0, 4, 40, 400]))
    plain = make_rotary(RopePlain(), 16).rotate(x, torch.tensor([0, 1, 10, 100]))
    torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("factor", "base"), [(2.0, 20221.2617), (4.0, 40889.9424), (8.0, 82684.6226)]
)
def test_ntk_changes_the_base(factor: float, base: float) -> None:
    theta = inverse_frequencies(RopeNTK(factor=factor), HEAD_DIM)
    plain = inverse_frequencies(RopePlain(), HEAD_DIM)
    # theta_1 = base^(-2 / D), so the base can be read off it.
    assert float(theta[1]) ** -64 == pytest.approx(base, rel=1e-8)
    assert theta[0] == plain[0]
    assert float(theta[63]) == pytest.approx(float(plain[63]) / factor, rel=1e-12)


@pytest.mark.parametrize("rope", [RopePlain(), RopePI(factor=1.0), RopeNTK(factor=1.0)])
def test_factor_one_is_plain(rope: Rope) -> None:
    assert torch.equal(
        inverse_frequencies(rope, HEAD_DIM), inverse_frequencies(RopePlain(), HEAD_DIM)
    )


def test_smallest_head_keeps_first_and_scales_last() -> None:
    theta = inverse_frequencies(RopeNTK(base=100.0, factor=3.0), 4)
    assert theta.tolist() == pytest.approx([1.0, 0.1 / 3.0], rel=1e-14)
    assert math.isclose(float(inverse_frequencies(RopePlain(base=100.0), 4)[1]), 0.1)

"""Rotary: pairs by halves, angles wide enough, an exact adjoint, and tables made once."""

import math

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary
from tests.tolerance import assert_matches, relative_error


def frequencies(head_dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)


def by_complex_numbers(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float) -> Tensor:
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    angles = positions.to(x.dtype)[..., None, None] * inv_freq
    z = z * torch.polar(torch.full_like(angles, factor), angles)
    return torch.cat([z.real, z.imag], -1)


def test_a_quarter_turn_by_hand() -> None:
    rotary = Rotary(torch.tensor([math.pi / 2, math.pi], dtype=torch.float64))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).expand(1, 3, 1, 4)
    y = rotary.rotate(x, torch.tensor([0, 1, 2]))[0, :, 0]
    expected = [[1, 2, 3, 4], [-3, -2, 1, -4], [-1, 2, -3, 4]]
    assert_matches(y, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("per_row", [False, True])
def test_equals_complex_multiplication(per_row: bool) -> None:
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64)
    positions = torch.randint(0, 100000, (2, 7) if per_row else (7,))
    y = Rotary(frequencies(10), 1.3).rotate(x, positions)
    assert_matches(y, by_complex_numbers(x, positions, frequencies(10), 1.3))


def test_the_gradient_is_the_adjoint_and_a_strided_input_is_taken() -> None:
    rotary = Rotary(frequencies(8), 1.2)
    x = torch.randn(3, 5, 2, 8, dtype=torch.float64).transpose(0, 1).requires_grad_()
    positions = torch.randint(0, 1000, (3,))
    assert torch.autograd.gradcheck(lambda x: rotary.rotate(x, positions), (x,))
    assert torch.autograd.gradgradcheck(lambda x: rotary.rotate(x, positions), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_angles_are_no_coarser_than_fp32_in_any_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(1, 64, 2, 16, dtype=dtype)
    positions = torch.arange(100000, 100064)
    truth = by_complex_numbers(x.double(), positions, frequencies(16), 1.0)
    y = Rotary(frequencies(16)).rotate(x, positions)
    assert y.dtype == dtype
    # fp32 carries an angle of 1e5 to 4e-3; bf16 would not know the turn at all.
    assert relative_error(y, truth) < 2 * torch.finfo(dtype).eps + 4e-3


def test_tables_are_made_once_for_equal_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = Rotary(frequencies(8))
    made = []
    make = rotary._make
    monkeypatch.setattr(rotary, "_make", lambda *args: made.append(args) or make(*args))
    x = torch.randn(1, 6, 2, 8)
    for _ in range(3):
        rotary.rotate(x, torch.arange(6))
        rotary.rotate(x, torch.arange(6) + 4)
    assert len(made) == 2
    rotary.rotate(x.double(), torch.arange(6))
    assert len(made) == 3


def test_positions_changed_in_place_are_not_confused_with_what_they_were() -> None:
    rotary, x = Rotary(frequencies(8)), torch.randn(1, 6, 2, 8, dtype=torch.float64)
    positions = torch.arange(6)
    rotary.rotate(x, positions)
    positions += 3
    assert_matches(
        rotary.rotate(x, positions), by_complex_numbers(x, positions, frequencies(8), 1.0)
    )


@pytest.mark.parametrize(
    ("x", "positions", "says"),
    [
        (torch.ones(1, 4, 2, 10), torch.arange(4), r"\[b, s, h, 8\]"),
        (torch.ones(1, 4, 2, 6), torch.arange(4), "4 frequencies"),
        (torch.ones(2, 4, 2, 8), torch.arange(5), r"integers \[4\] or \[2, 4\]"),
        (torch.ones(2, 4, 2, 8), torch.arange(4.0), "float32"),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, positions: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Rotary(frequencies(8)).rotate(x, positions)


def test_a_table_of_frequencies_is_refused() -> None:
    with pytest.raises(ValueError, match="inv_freq"):
        Rotary(torch.ones(2, 4))

"""The rotary kernel: against complex multiplication at any position, strided, and its adjoint."""

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary
from lcdist_kernels.rotary_kernel import rotate, turns
from tests.kernels.test_rotary import by_complex_numbers, frequencies
from tests.tolerance import assert_matches, relative_error

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def by_kernel(x: Tensor, positions: Tensor, inv_freq: Tensor, factor: float) -> Tensor:
    return rotate(x, positions, turns(inv_freq).to(HERE), factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("first", [0, 100_003, 1_048_576, 2_000_000_000])
def test_equals_complex_multiplication_at_any_position(first: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 37, 3, 20, device=HERE).to(dtype)
    positions = torch.arange(first, first + 37)
    truth = by_complex_numbers(x.cpu().double(), positions, frequencies(20), 1.3)
    y = by_kernel(x, positions, frequencies(20), 1.3)
    assert y.dtype == dtype
    # One rounding to x.dtype; a position costs nothing (fp32 angles would: 0.06 at a million).
    assert relative_error(y, truth) < torch.finfo(dtype).eps


def test_positions_of_each_row_and_negative_frequencies() -> None:
    x = torch.randn(3, 21, 2, 10, device=HERE)
    positions, inv_freq = torch.randint(0, 100000, (3, 21)), -3 * frequencies(10)
    truth = by_complex_numbers(x.cpu().double(), positions, inv_freq, 1.0)
    for given in (positions, positions.to(HERE), positions.T.contiguous().T.int()):
        assert_matches(by_kernel(x, given, inv_freq, 1.0).cpu(), truth, 1e-6)


def test_a_strided_input_is_taken_and_nothing_outside_is_touched() -> None:
    home = torch.full((40, 2, 5, 26), torch.nan, device=HERE)
    view = home[:35, :, 1:4, :20].transpose(0, 1)
    x, positions = torch.randn(2, 35, 3, 20, device=HERE), torch.arange(35)
    view.copy_(x)
    expected = by_kernel(x, positions, frequencies(20), 1.0)
    assert torch.equal(by_kernel(view, positions, frequencies(20), 1.0), expected)
    apart = x.transpose(1, 3).contiguous().transpose(1, 3)
    assert torch.equal(by_kernel(apart, positions, frequencies(20), 1.0), expected)


def test_the_gradient_is_the_adjoint_twice_over() -> None:
    positions = torch.randint(0, 1000, (11,))
    x, dy, z = (torch.randn(2, 11, 2, 12, device=HERE) for _ in range(3))
    x.requires_grad_()
    dy.requires_grad_()
    (dx,) = torch.autograd.grad(
        by_kernel(x, positions, frequencies(12), 1.2), x, dy, create_graph=True
    )
    expected = by_complex_numbers(dy.detach().cpu().double(), -positions, frequencies(12), 1.2)
    assert_matches(dx.cpu(), expected, 1e-6)
    (again,) = torch.autograd.grad(dx, dy, z)
    assert torch.equal(again, by_kernel(z, positions, frequencies(12), 1.2))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rotary_takes_the_kernel_on_a_gpu(dtype: torch.dtype) -> None:
    x, positions = torch.randn(2, 1000, 4, 128, device="cuda").to(dtype), torch.arange(1000) + 10**6
    y = Rotary(frequencies(128), 1.1).rotate(x, positions)
    assert torch.equal(y, by_kernel(x, positions, frequencies(128), 1.1))
    truth = by_complex_numbers(x.cpu().double(), positions, frequencies(128), 1.1)
    assert relative_error(y, truth) < torch.finfo(dtype).eps


@pytest.mark.gpu
def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    x = torch.zeros(2, 4096, 1100, 256, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-1, -16:].normal_()
    positions = torch.arange(4096)
    y = by_kernel(x, positions, frequencies(256), 1.0)
    expected = by_kernel(x[-1:, -16:].clone(), positions[-16:], frequencies(256), 1.0)
    assert torch.equal(y[-1:, -16:], expected) and torch.all(y[0] == 0)

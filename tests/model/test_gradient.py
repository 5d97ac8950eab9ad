"""Weight gradients in `main_grad`: sums, placeholders and what starts a step."""

import pytest
import torch
from torch import Tensor, nn

from lcdist.model.gradient import (
    accumulate,
    accumulate_rows,
    claim,
    is_placeholder,
    start_step,
)


def weight_of(dtype: torch.dtype) -> nn.Parameter:
    """Return a claimed weight `[5, 3]` with a `main_grad` that holds nonsense."""
    weight = nn.Parameter(torch.randn(5, 3, dtype=dtype))
    vars(weight)["main_grad"] = torch.full((5, 3), torch.nan)
    claim(weight)
    return weight


class Product(torch.autograd.Function):
    """x W^T."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy: Tensor):
        return None, accumulate(ctx.weight, dy, ctx.saved_tensors[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_a_step_are_summed(dtype: torch.dtype) -> None:
    weight, seen = weight_of(dtype), []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad))
    for _ in range(2):
        start_step([weight])
        expected = torch.zeros(5, 3)
        for _ in range(3):
            x, dy = torch.randn(2, 4, 3, dtype=dtype), torch.randn(2, 4, 5, dtype=dtype)
            Product.apply(x, weight).backward(dy)
            expected += (dy.flatten(0, 1).t() @ x.flatten(0, 1)).float()
            assert vars(weight)["grad_added_to_main_grad"]
            weight.grad = None
        torch.testing.assert_close(vars(weight)["main_grad"], expected)
    # The hook of data parallelism runs once a backward pass and gets nothing to add.
    assert len(seen) == 6 and all(map(is_placeholder, seen))


def test_a_gradient_that_autograd_brings_is_added_to_zero() -> None:
    weight = weight_of(torch.float32)
    start_step([weight])
    weight.sum().backward()
    assert torch.equal(vars(weight)["main_grad"], torch.zeros(5, 3))
    assert weight.grad is not None and not is_placeholder(weight.grad)


def test_parameters_without_products_are_cleared() -> None:
    norm = nn.Parameter(torch.ones(3))
    vars(norm)["main_grad"] = torch.full((3,), torch.nan)
    start_step([norm])
    assert torch.equal(vars(norm)["main_grad"], torch.zeros(3))
    assert not vars(norm)["grad_added_to_main_grad"]


def test_without_main_grad_the_product_is_returned() -> None:
    weight, x, dy = nn.Parameter(torch.randn(5, 3)), torch.randn(4, 3), torch.randn(4, 5)
    dw = accumulate(weight, dy, x)
    assert dw is not None and torch.equal(dw, dy.t() @ x)
    rows, dy = torch.tensor([1, 3, 1, 0]), torch.randn(4, 3)
    expected = torch.zeros(5, 3).index_add_(0, rows, dy)
    torch.testing.assert_close(accumulate_rows(weight, rows, dy), expected)


def test_rows_are_added_after_a_product_and_before_it() -> None:
    rows, dx, x = torch.tensor([1, 3, 1]), torch.randn(3, 3), torch.randn(4, 3)
    dy = torch.randn(4, 5)
    expected = (dy.t() @ x).index_add_(0, rows, dx)
    for steps in ("rows first", "product first"):
        weight = weight_of(torch.float32)
        start_step([weight])
        if steps == "rows first":
            accumulate_rows(weight, rows, dx)
        accumulate(weight, dy, x)
        if steps == "product first":
            accumulate_rows(weight, rows, dx)
        torch.testing.assert_close(vars(weight)["main_grad"], expected)


def test_a_tied_weight_gets_its_gradient_by_the_embedding() -> None:
    weight = weight_of(torch.float32)
    vars(weight)["is_tied_embedding"] = True
    assert accumulate(weight, torch.randn(4, 5), torch.randn(4, 3)) is None
    assert is_placeholder(accumulate_rows(weight, torch.tensor([1]), torch.randn(1, 3)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 128, 256), (100, 72, 40)])
def test_bf16_products_add_to_fp32_on_a_gpu(shape: tuple[int, int, int]) -> None:
    tokens, rows, columns = shape
    weight = nn.Parameter(torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda"))
    vars(weight)["main_grad"] = torch.full((rows, columns), torch.nan, device="cuda")
    claim(weight)
    start_step([weight])
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for _ in range(3):
        dy, x = (torch.randn(tokens, n, device="cuda").bfloat16() for n in (rows, columns))
        accumulate(weight, dy, x)
        expected += dy.cpu().double().t() @ x.cpu().double()
    # A product that were rounded to bf16 before it is added would be off by 4e-3.
    torch.testing.assert_close(
        vars(weight)["main_grad"].cpu().double(), expected, rtol=1e-5, atol=1e-3
    )

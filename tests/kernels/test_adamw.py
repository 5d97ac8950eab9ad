"""AdamW over many tensors: the kernel and torch against the reference, and the gate."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels.adamw import Hyper, Tensors, adamw_, adamw_reference, kernel
from tests.kernels.helpers import HERE
from tests.kernels.tiers import covering, one
from tests.tolerance import assert_matches

FP32 = 1e-6
SHAPES = [(1,), (7, 5), (64,), (3, 100), (130,)]
HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, step=3, clip_norm=0.5)


def problem(weights: torch.dtype | None, dtype: torch.dtype, apart: int) -> Tensors:
    """Return tensors of odd sizes, `apart` elements from the tensors before them, in NaN."""
    generator = torch.Generator().manual_seed(1)

    def make(dtype: torch.dtype, square: bool = False) -> list[Tensor]:
        found = []
        for shape in SHAPES:
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            home = torch.full((x.numel() + 16 + 2 * apart,), torch.nan, dtype=dtype, device=HERE)
            view = home[16 + apart :][: x.numel()].view(shape)
            found.append(view.copy_(x.square() if square else x))
        return found

    gradients, masters, first, second = (
        make(dtype, square) for square in (False, False, False, True)
    )
    low: list[Any] = [None] * len(SHAPES) if weights is None else make(weights)
    if weights is not None:
        low[1] = None
    decays = [0.1 if len(shape) > 1 else 0.0 for shape in SHAPES]
    return Tensors(gradients, masters, first, second, low, decays, [1.0, 1.0, 4.0, 1.0, 1.0])


def totals_of(tensors: Tensors, loss: float = 7.0, tokens: float = 5.0) -> Tensor:
    squares = sum(float(g.double().square().sum()) for g in tensors.gradients)
    return torch.tensor([loss, tokens, squares, 2 * squares], dtype=torch.float64, device=HERE)


def homes(tensors: Tensors) -> list[Tensor]:
    """Return the memory of everything that a step could write, copied."""
    rows: list[Any] = [*tensors[:4], [x for x in tensors.weights if x is not None]]
    return [x._base.clone() for row in rows for x in row]


CASES = [
    ("triton", torch.float32, None),
    ("triton", torch.float32, torch.bfloat16),
    ("triton", torch.float32, torch.float16),
    ("torch", torch.float32, torch.bfloat16),
    ("torch", torch.float64, None),
]


@pytest.mark.parametrize(
    ("impl", "dtype", "weights", "clip_norm", "apart"),
    covering(CASES, one([0.5, 0.0, 1e6]), one([0, 1])),
)
def test_equals_the_reference(
    impl: str,
    dtype: torch.dtype,
    weights: torch.dtype | None,
    clip_norm: float,
    apart: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "PIECE", 64)
    monkeypatch.setattr(kernel, "BLOCK", 32)
    tensors = problem(weights, dtype, apart)
    totals, hyper = totals_of(tensors), HYPER._replace(clip_norm=clip_norm)
    expected = adamw_reference(tensors, totals, hyper)
    gradients = [x.clone() for x in tensors.gradients]
    adamw_(tensors, totals, hyper, impl)
    tolerance = 1e-14 if dtype == torch.float64 else FP32
    for number, truth in enumerate(expected):
        found = tensors.masters[number], tensors.first[number], tensors.second[number]
        for actual, reference in zip(found, truth, strict=True):
            assert_matches(actual, reference, tolerance)
        weight = tensors.weights[number]
        assert weight is None or torch.equal(weight, found[0].to(weight.dtype))
    assert all(map(torch.equal, gradients, tensors.gradients))
    for home, x in zip(homes(tensors), [y for row in tensors[:4] for y in row], strict=False):
        assert home.isnan().sum() == len(home) - x.numel(), "something outside was written"


REFUSED = [(math.nan, 5.0, 1.0), (math.inf, 5.0, 1.0), (1.0, 0.0, 1.0), (1.0, 5.0, math.inf)]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize(("loss", "tokens", "factor"), [*REFUSED, (1.0, 5.0, math.nan)])
def test_a_refused_step_writes_nothing(
    impl: str, loss: float, tokens: float, factor: float
) -> None:
    tensors = problem(torch.bfloat16, torch.float32, 0)
    for weight, master in zip(tensors.weights, tensors.masters, strict=True):
        if weight is not None:
            weight.copy_(master)
    totals = totals_of(tensors, loss, tokens)
    totals[3] *= factor
    before = homes(tensors)
    adamw_(tensors, totals, HYPER, impl)
    for one_before, one_after in zip(before, homes(tensors), strict=True):
        assert torch.equal(one_before.nan_to_num(), one_after.nan_to_num())


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_many_steps_are_those_of_torchs_adamw(impl: str) -> None:
    tensors = problem(None, torch.float32, 0).some([1])
    zeros = [torch.zeros_like(x) for x in tensors.masters]
    tensors = tensors._replace(first=zeros, second=[torch.zeros_like(x) for x in zeros])
    leaves = [x.double().clone().requires_grad_() for x in tensors.masters]
    groups: Any = [
        {"params": [leaf], "weight_decay": decay, "lr": HYPER.lr * ratio}
        for leaf, decay, ratio in zip(leaves, tensors.decays, tensors.lr_ratios, strict=True)
    ]
    adamw = torch.optim.AdamW(groups, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps)
    generator = torch.Generator().manual_seed(2)
    for step in range(1, 21):
        for gradient in tensors.gradients:
            gradient.copy_(torch.randn(gradient.shape, generator=generator))
        for leaf, gradient in zip(leaves, tensors.gradients, strict=True):
            leaf.grad = gradient.double() / 5
        torch.nn.utils.clip_grad_norm_(leaves, HYPER.clip_norm)
        adamw.step()
        adamw_(tensors, totals_of(tensors), HYPER._replace(step=step), impl)
    for found, expected in zip(tensors.masters, leaves, strict=True):
        assert_matches(found, expected, FP32)


def test_tables_are_made_again_when_a_tensor_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], kernel._make
    monkeypatch.setattr(kernel, "_make", lambda *args: made.append(args) or make(*args))
    tensors = problem(torch.bfloat16, torch.float32, 0)
    totals = totals_of(tensors)
    for _ in range(3):
        adamw_(tensors, totals, HYPER, "triton")
    assert len(made) == 1
    moved = tensors._replace(gradients=[x.clone() for x in tensors.gradients])
    adamw_(moved, totals, HYPER, "triton")
    adamw_(moved._replace(decays=[0.0] * len(SHAPES)), totals, HYPER, "triton")
    assert len(made) == 3


def test_what_does_not_fit_is_refused() -> None:
    tensors = problem(None, torch.float32, 0)
    totals = totals_of(tensors)
    with pytest.raises(ValueError, match=r"expected float64 \[4\]"):
        adamw_(tensors, totals.float(), HYPER)
    with pytest.raises(ValueError, match="contiguous tensors of one shape"):
        adamw_(tensors._replace(first=[x.double() for x in tensors.first]), totals, HYPER)
    with pytest.raises(ValueError, match="the kernel takes fp32 masters"):
        adamw_(problem(None, torch.float64, 0), totals, HYPER, "triton")
    with pytest.raises(ValueError, match="use one of auto, triton, torch"):
        adamw_(tensors, totals, HYPER, "apex")

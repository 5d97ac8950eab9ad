"""Transformer Engine's norm by capability: found, tested, and equal to ours where it is chosen."""

from typing import Any

import pytest
import torch

from lcdist_kernels import apex, transformer_engine
from lcdist_kernels.extensions import find, missing
from lcdist_kernels.step_kernels import choose_step_kernels
from tests.kernels.apex_stand_ins import forget_extensions
from tests.kernels.test_apex import NORM_CASES, calls_of_equal_norms, norms
from tests.kernels.transformer_engine_stand_in import StandIn, transformer_engine_installed

CPU = torch.device("cpu")
PARTS = transformer_engine.PARTS


def test_a_machine_without_it_says_what_is_missing() -> None:
    forget_extensions()
    assert find(PARTS["norm"], CPU) is None
    [absent] = missing(PARTS.values(), CPU)
    assert absent.startswith("norm (transformer_engine_torch: No module named 'transformer_engine")


def test_wrong_results_and_missing_functions_are_found() -> None:
    with transformer_engine_installed(StandIn(factor=1.5)):
        assert missing(PARTS.values(), CPU) == [
            "norm (transformer_engine_torch gives other results than torch)"
        ]
    stand_in = StandIn()
    modules = stand_in.modules()
    del modules["transformer_engine_torch"].rmsnorm_bwd
    stand_in.modules = lambda: modules
    with transformer_engine_installed(stand_in):
        assert missing(PARTS.values(), CPU) == [
            "norm (transformer_engine_torch has no rmsnorm_bwd)"
        ]


@pytest.mark.parametrize(("dtype", "has_delta"), NORM_CASES)
def test_norms_equal_torchs(dtype: torch.dtype, has_delta: bool) -> None:
    block = transformer_engine_installed(StandIn())
    # The self-test, then forward, forward again and backward.
    expected = ["fwd", "bwd", "fwd", "fwd", "bwd"]
    assert calls_of_equal_norms(block, dtype, has_delta) == expected


def test_float64_and_other_choices_never_ask_it() -> None:
    given = [torch.randn(2, 8), torch.rand(8), torch.randn(2, 8)]
    cases = [("te", torch.float64), *((kernels, torch.float32) for kernels in ("auto", "torch"))]
    for kernels, dtype in cases:
        with transformer_engine_installed(StandIn(), kernels) as stand_in:
            x, weight, dout = (y.to(dtype) for y in given)
            norms(x, None, weight, [dout] * 2)
            assert not stand_in.calls


def test_a_first_norm_without_gradients_finds_it() -> None:
    with transformer_engine_installed(StandIn()), torch.no_grad():
        assert find(PARTS["norm"], CPU) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["apex", "te"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_of_other_packages_equal_ours_on_a_gpu(kernels: str, dtype: torch.dtype) -> None:
    part = {"apex": apex, "te": transformer_engine}[kernels].PARTS["norm"]
    device = torch.device("cuda")
    [*absent] = missing([part], device)
    if absent:
        pytest.skip(f"{part.package} is not used on this machine: {absent[0]}")
    x, delta, *douts = (torch.randn(2, 500, 2048, device=device).to(dtype) for _ in range(4))
    given: Any = (x, delta, torch.rand(2048, device=device).to(dtype), douts)
    expected = norms(*given)
    choose_step_kernels(kernels)
    try:
        got, again = norms(*given), norms(*given)
    finally:
        choose_step_kernels("auto")
    # The weight's gradient is a sum over 1,000 tokens.
    rounding = 1e-5 if dtype == torch.float32 else 4e-2
    for actual, repeated, truth in zip(got, again, expected, strict=True):
        assert torch.equal(actual, repeated)
        close = rounding * (1 if truth.dim() == 3 else 32)
        torch.testing.assert_close(actual, truth, rtol=rounding, atol=close)

"""apex by capability: found by its functions, tested, and equal to torch where it is chosen."""

import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from lcdist_kernels import apex
from lcdist_kernels.adamw import Hyper, Tensors, adamw_
from lcdist_kernels.extensions import find, missing
from lcdist_kernels.norm import add_norm, scale_rows
from lcdist_kernels.step_kernels import choose_step_kernels
from tests.kernels.apex_stand_ins import (
    StandIns,
    apex_installed,
    forget_extensions,
    package_apex,
)

CPU = torch.device("cpu")
PARTS = list(apex.PARTS.values())


def test_nothing_is_found_where_nothing_is_installed() -> None:
    forget_extensions()
    assert [find(part, CPU) for part in PARTS] == [None] * 3
    absent = missing(PARTS, CPU)
    assert len(absent) == 3 and absent[0].startswith("weights (fused_weight_gradient_mlp_cuda: ")


def test_wrong_results_and_missing_functions_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with apex_installed(StandIns(factor=1.5)):
        assert all("gives other results than torch" in words for words in missing(PARTS, CPU))
    modules = StandIns().modules()
    del modules["amp_C"].multi_tensor_adam_capturable
    stand_ins = StandIns()
    monkeypatch.setattr(stand_ins, "modules", lambda: modules)
    with apex_installed(stand_ins):
        assert missing(PARTS, CPU) == ["adamw (amp_C has no multi_tensor_adam_capturable)"]


def test_the_other_project_of_that_name_is_known_by_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lcdist_kernels")
    with package_apex(tmp_path / "web", "models.py", "views/__init__.py"):
        said = [apex.other_project() for _ in range(2)]
        assert (
            said
            == [
                f"the installed package apex ({tmp_path}/web/apex/__init__.py) is another project, "
                "not NVIDIA's"
            ]
            * 2
        )
        assert [r.message for r in caplog.records] == [f"{said[0]}: ignored"]
    with package_apex(tmp_path / "nvidia", "normalization/__init__.py", "amp/__init__.py"):
        assert apex.other_project() is None
    (tmp_path / "clone" / "apex" / "apex").mkdir(parents=True)
    with patch.object(sys, "path", [str(tmp_path / "clone"), *sys.path]):
        apex.other_project.cache_clear()
        assert apex.other_project() is None


def norms(x: Tensor, delta: Tensor | None, weight: Tensor, douts: list[Tensor]) -> list[Tensor]:
    """Return sum, norm and gradients."""
    leaves = [y.clone().requires_grad_() for y in (x, delta, weight) if y is not None]
    given = leaves if delta is not None else [leaves[0], None, leaves[1]]
    total, normed, rstd = add_norm(given[0], given[1], given[-1], 1e-5)  # pyright: ignore[reportArgumentType]
    again = scale_rows(total.detach(), rstd, weight, 1e-5)
    assert torch.equal(again, normed)
    grads = torch.autograd.grad([total, normed], leaves, douts)
    return [total.detach(), normed.detach(), *grads]


NORM_CASES = [(dtype, d) for dtype in (torch.float32, torch.bfloat16) for d in (True, False)]


def calls_of_equal_norms(
    block: AbstractContextManager[Any], dtype: torch.dtype, has_delta: bool
) -> list[str]:
    """Compare norms inside `block`, where a stand-in is installed, with torch's.

    Returns:
        The calls of the stand-in.
    """
    x, delta, *douts = (torch.randn(3, 2, 40).to(dtype) for _ in range(4))
    weight = torch.rand(40).to(dtype)
    given: Any = (x, delta if has_delta else None, weight, douts)
    expected = norms(*given)
    with block as stand_in:
        got = norms(*given)
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for actual, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=rounding, atol=rounding)
    return stand_in.calls


@pytest.mark.parametrize(("dtype", "has_delta"), NORM_CASES)
def test_norms_equal_torchs(dtype: torch.dtype, has_delta: bool) -> None:
    calls = calls_of_equal_norms(apex_installed(StandIns()), dtype, has_delta)
    # Once in the self-test, then forward and again.
    assert calls.count("norm") == 3


@pytest.mark.parametrize("tokens", [7.0, 0.0])
def test_an_update_equals_torchs(tokens: float) -> None:
    def made() -> Tensors:
        torch.manual_seed(0)
        gradients, masters, first = ([torch.randn(5, 3), torch.randn(4)] for _ in range(3))
        second = [x.square() for x in gradients]
        weights = [masters[0].bfloat16(), None]
        return Tensors(gradients, masters, first, second, weights, [0.1, 0.0], [1.0, 2.0])

    totals = torch.tensor([3.0, tokens, 40.0, 40.0], dtype=torch.float64)
    hyper = Hyper(1e-2, 0.9, 0.95, 1e-8, 3, 1.0)
    expected, got = made(), made()
    adamw_(expected, totals, hyper)
    with apex_installed(StandIns()) as stand_ins:
        adamw_(got, totals, hyper)
        # The self-test's two, and one for each pair of decay and rate.
        assert stand_ins.calls.count("adamw") == 4
    for actual, truth in zip(got[:4], expected[:4], strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-6, atol=1e-7)
    assert torch.equal(got.weights[0], expected.weights[0])  # pyright: ignore[reportArgumentType]


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels = 'fast' is unknown: use one of auto, own, apex"):
        choose_step_kernels("fast")


def test_torch_and_own_never_ask_apex() -> None:
    for kernels in ("torch", "own", "auto"):
        with apex_installed(StandIns(), kernels) as stand_ins:
            norms(torch.randn(2, 8), None, torch.rand(8), [torch.randn(2, 8)] * 2)
            assert not stand_ins.calls

"""LSSA and LSSAR under context parallelism: other powers, bytes and flops by hand, skipping."""

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from lcdist.attention import METHODS, Shape, Traffic
from lcdist.attention.lssar import attention as lssar
from lcdist.config.schema import LssarOptions
from lcdist.layout import KINDS, ContextLayout
from lcdist_kernels.lssar import TORCH_IMPL
from tests.attention.body import Problem, assert_all_match, make, on_virtual_ranks, tiered, whole
from tests.attention.checks import assert_evaluation_sends_what_training_sends

METHOD = METHODS["lssar"]
LSSA = LssarOptions(reweight=False)
POWERS = [LssarOptions(power=3.0), LssarOptions(power=1.5, exempt_rows=0)]
IMPLS = ("reference", "torch")


def problem_of(options: LssarOptions, kind: str, cp_size: int, **more: Any) -> Problem:
    return dataclasses.replace(make("lssar", kind, cp_size, **more), options=options)


EVERY_CASE = list(product(KINDS, (1, 2, 3, 4, 5, 6, 8), (False, True)))
DEFAULT_CASES = {("contiguous", 1, True), ("striped", 2, False), ("zigzag", 5, True)}


@pytest.mark.parametrize("options", POWERS)
@pytest.mark.parametrize(("kind", "cp_size", "packed"), tiered(EVERY_CASE, DEFAULT_CASES))
def test_other_powers_on_virtual_ranks_equal_reference(
    kind: str, cp_size: int, packed: bool, options: LssarOptions
) -> None:
    problem = problem_of(options, kind, cp_size, packed=packed)
    truth = whole(problem)
    for impl in IMPLS:
        assert_all_match(on_virtual_ranks(problem, impl)[0], truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_default_scale_is_the_log_of_head_dim(impl: str) -> None:
    for options in (LSSA, LssarOptions()):
        problem = problem_of(options, "zigzag", 3)
        given = dataclasses.replace(problem, softmax_scale=torch.tensor(16.0).double().log().item())
        silent = dataclasses.replace(problem, softmax_scale=None)
        assert_all_match(on_virtual_ranks(silent, impl)[0], whole(given))


def test_power_below_1_raises_in_half_precision() -> None:
    problem = problem_of(LssarOptions(power=0.5), "zigzag", 2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"power = 0\.5 with torch\.bfloat16"):
        on_virtual_ranks(problem, "torch")


@pytest.mark.parametrize(("itemsize", "grad_size"), [(2, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize(("reweight", "parts"), [(True, 3), (False, 2)])
def test_bytes_by_hand(itemsize: int, grad_size: int, reweight: bool, parts: int) -> None:
    shape = Shape(batch=1, nheads=4, nheads_kv=2, head_dim=8, itemsize=itemsize)
    keys = 6 * 2 * 8
    options = LssarOptions(reweight=reweight)
    counted = METHOD.bytes(options, shape, ContextLayout("contiguous", 18, 3))
    backward = 2 * 2 * keys * itemsize + 3 * 2 * keys * grad_size
    assert counted == Traffic((2 * parts * keys * itemsize,) * 3, (backward,) * 3)
    assert METHOD.bytes(options, shape, ContextLayout("zigzag", 18, 1)) == Traffic((0,), (0,))


def test_evaluation_sends_what_training_sends_forward() -> None:
    assert_evaluation_sends_what_training_sends(make("lssar", "zigzag", 3))


def test_flops_by_hand() -> None:
    # 3 heads of 5, 4 tokens: 10 pairs, 5 multiply-adds each for a score and for the value.
    shape = Shape(batch=2, nheads=3, nheads_kv=1, head_dim=5, itemsize=2, seqlen=4)
    assert METHOD.flops(LSSA, shape) == 2 * 3 * 10 * (5 + 5) * 2
    assert METHOD.flops(METHOD.options(), shape) == 2 * 3 * 10 * (5 + 5 + 5) * 2


@pytest.mark.parametrize(("options", "passes"), [(LSSA, 1), (LssarOptions(), 2)])
def test_blocks_in_the_future_are_skipped(
    options: LssarOptions, passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    visits = []

    def counted(plain: Callable) -> Callable:
        return lambda *args: visits.append(1) or plain(*args)

    impl = TORCH_IMPL._replace(sums=counted(TORCH_IMPL.sums), fwd=counted(TORCH_IMPL.fwd))
    monkeypatch.setattr(lssar.ops, "select_lssar_impl", lambda *_: impl)
    problem = problem_of(options, "contiguous", 4)
    assert_all_match(on_virtual_ranks(problem, "torch")[0], whole(problem))
    assert len(visits) == passes * (1 + 2 + 3 + 4)


def test_one_token_per_rank_equals_reference() -> None:
    for kind in ("contiguous", "striped"):
        for options in (LSSA, LssarOptions()):
            problem = problem_of(options, kind, 8, at_least=1)
            assert problem.layout.local_seqlen == 1
            for impl in IMPLS:
                assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


def test_half_precision_inputs_give_half_precision_results() -> None:
    problem = make("lssar", "zigzag", 2, dtype=torch.float16)
    for impl in ("reference", "torch", "auto"):
        assert all(x.dtype == torch.float16 for x in on_virtual_ranks(problem, impl)[0])

"""Full attention under context parallelism: bytes and flops by hand, skipped blocks, edge sizes."""

import pytest
import torch

from lcdist.attention import METHODS, Shape, Traffic
from lcdist.attention.full import attention as full
from lcdist.layout import ContextLayout
from lcdist_kernels.full import TORCH_IMPL
from tests.attention.body import assert_all_match, make, on_virtual_ranks, whole
from tests.attention.checks import (
    assert_documents_of_one_token_return_values,
    assert_ranks_equal_reference,
)

METHOD = METHODS["full"]
OPTIONS = METHOD.options()


def test_flops_by_hand() -> None:
    # 3 heads of 5, 4 tokens: 10 pairs, 5 multiply-adds each for the score and for the value.
    shape = Shape(batch=2, nheads=3, nheads_kv=1, head_dim=5, itemsize=2, seqlen=4)
    assert METHOD.flops(OPTIONS, shape) == 2 * 3 * 10 * (5 + 5) * 2
    with pytest.raises(ValueError, match="seqlen"):
        METHOD.flops(OPTIONS, Shape(batch=2, nheads=3, nheads_kv=1, head_dim=5, itemsize=2))


@pytest.mark.parametrize(("itemsize", "grad_size"), [(2, 4), (4, 4), (8, 8)])
def test_bytes_by_hand(itemsize: int, grad_size: int) -> None:
    shape = Shape(batch=1, nheads=4, nheads_kv=2, head_dim=8, itemsize=itemsize)
    kv = 2 * 1 * 6 * 2 * 8
    counted = METHOD.bytes(OPTIONS, shape, ContextLayout("contiguous", 18, 3))
    assert counted == Traffic(
        (2 * kv * itemsize,) * 3, (2 * kv * itemsize + 3 * kv * grad_size,) * 3
    )
    assert METHOD.bytes(OPTIONS, shape, ContextLayout("zigzag", 18, 1)) == Traffic((0,), (0,))


def test_blocks_in_the_future_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = []
    counting = TORCH_IMPL._replace(fwd=lambda *args: visits.append(1) or TORCH_IMPL.fwd(*args))
    monkeypatch.setattr(full, "select_block_impl", lambda *_: counting)
    problem = make("full", "contiguous", 4)
    assert_all_match(on_virtual_ranks(problem, "torch")[0], whole(problem))
    assert len(visits) == 1 + 2 + 3 + 4


def test_documents_of_one_token_return_values() -> None:
    assert_documents_of_one_token_return_values(make("full", "striped", 3))


def test_one_token_per_rank_equals_reference() -> None:
    for kind in ("contiguous", "striped"):
        problem = make("full", kind, 8, at_least=1)
        assert problem.layout.local_seqlen == 1
        assert_ranks_equal_reference(problem)


def test_half_precision_inputs_give_half_precision_results() -> None:
    problem = make("full", "zigzag", 2, dtype=torch.float16)
    for impl in ("reference", "torch", "auto"):
        assert all(x.dtype == torch.float16 for x in on_virtual_ranks(problem, impl)[0])

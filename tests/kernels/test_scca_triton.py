"""SCCA by full attention's kernels: against the dense reference, in every exchange, and refused.

Without a GPU they run in Triton's interpreter; tests marked `gpu` need one.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.config.schema import SccaOptions
from lcdist_kernels import scca_attention, scca_reference
from lcdist_kernels.common import document_starts
from lcdist_kernels.full import TRITON_IMPL
from lcdist_kernels.scca import Rule, dense_mask, head_groups, self_parts
from tests.attention.body import Variant, make, on_virtual_ranks
from tests.kernels.helpers import (
    HERE,
    assert_kernels_are_right,
    assert_ranks_of_kernels_are_right,
    first_row,
    in_nan,
    on_device,
    on_its_device,
    rotated_and_packed,
    truth_by,
)
from tests.kernels.repeat import assert_same_bits
from tests.kernels.test_full import with_grads
from tests.kernels.test_scca import MIXED, assert_rows_without_keys_are_zero
from tests.kernels.tiers import covering, one, tiered
from tests.tolerance import assert_as_good_as_eager

# One a kind, for key heads of one member, two of which the rules are not alike, and four.
FEW = (Rule("chunk", 17, 9), Rule("pair", 3, 1), Rule("key", 4, 2), Rule("fold", 16, 48))
TURNS = (Rule("split", 19, 8), Rule("chunk", 17, 9)) * 2
SHAPES: list[tuple[int, tuple[int, int], tuple[Rule, ...], int]] = [
    *((n, (4, 2), FEW, 16) for n in (1, 63, 100, 257)),
    *((70, (4, heads), TURNS, 16) for heads in (4, 2, 1)),
    (70, (4, 4), FEW, 48),
    (70, (8, 4), MIXED, 16),
    # Of all key heads one rule, or every other: query heads that no one stride reaches.
    (70, (8, 4), tuple(FEW[i] for i in (0, 0, 1, 1, 0, 0, 1, 1)), 16),
]


truth_of = truth_by(scca_reference)


@pytest.mark.parametrize(
    ("seqlen", "heads", "rules", "head_dim", "packed"), covering(SHAPES, one([True, False]))
)
def test_equals_reference(
    seqlen: int, heads: tuple[int, int], rules: tuple[Rule, ...], head_dim: int, packed: bool
) -> None:
    qkv = first_row(seqlen, heads, head_dim)
    more = {"rules": rules, **rotated_and_packed(seqlen, head_dim, packed)}
    assert_kernels_are_right(scca_attention, truth_of, qkv, **more)


def assert_accurate(
    seqlen: int, head_dim: int, dtype: torch.dtype, rules: tuple[Rule, ...]
) -> None:
    qkv = on_device(seqlen, (4, 2), head_dim, dtype)
    dout = torch.randn_like(qkv[0])
    index, starts = torch.arange(seqlen), torch.zeros(seqlen, dtype=torch.int64)
    mask = dense_mask(rules, index, starts, index, starts).to(HERE)
    k, v = (x.repeat_interleave(2, 2) for x in qkv[1:])
    scores = torch.einsum("bshd,bthd->bhst", qkv[0], k) * head_dim**-0.5
    seen = mask.any(-1)[..., None]
    weights = scores.masked_fill(~mask & seen, -torch.inf).softmax(-1) * seen
    eager = with_grads(torch.einsum("bhst,bthd->bshd", weights.to(v.dtype), v), qkv, dout)
    got = with_grads(scca_attention(*qkv, rules=rules, impl="triton"), qkv, dout)
    for a, e, r in zip(got, eager, truth_of(qkv, dout, rules=rules), strict=True):
        assert a.dtype == dtype
        assert_as_good_as_eager(a, e, r)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_good_as_eager_in_half_precision(dtype: torch.dtype) -> None:
    assert_accurate(100, 48, dtype, FEW)


# A ratio of errors says nothing of one token, whose dq and dk are 0: fp32 has that case.
@pytest.mark.parametrize("seqlen", tiered(one([63, 128, 257]), {0}))
def test_half_precision_at_any_length(seqlen: int) -> None:
    assert_accurate(seqlen, 16, torch.float16, FEW)


def test_any_strides_are_taken_and_nothing_outside_is_read() -> None:
    plain = on_device(70, (4, 2), 20, torch.float32)
    dout = torch.randn_like(plain[0])
    truth = with_grads(scca_attention(*plain, rules=FEW, impl="triton"), plain, dout)
    strided = [in_nan(x.detach()).requires_grad_() for x in plain]
    out = scca_attention(*strided, rules=FEW, impl="triton")
    for actual, reference in zip(with_grads(out, strided, in_nan(dout)), truth, strict=True):
        assert torch.equal(actual, reference)


def test_rows_that_see_nothing_are_zero_and_do_no_harm() -> None:
    assert_rows_without_keys_are_zero(lambda n: on_device(n, (4, 4), dtype=torch.float32), "triton")


@pytest.mark.parametrize("cu_seqlens", [None, torch.arange(0, 5000, 1000, dtype=torch.int32)])
def test_a_window_rule_is_one_launch(cu_seqlens: Tensor | None) -> None:
    starts = document_starts(cu_seqlens, torch.arange(5000), 5000)
    for rule in (
        Rule("chunk", 64),
        Rule("chunk", 64, 32),
        Rule("chunk", 64, 200),
        Rule("split", 64, 9),
    ):
        (part,) = self_parts(head_groups([rule] * 2, 2), starts, TRITON_IMPL)
        assert len(part.q_hi) == 5000
        assert all((x.diff() >= 0).all() for x in part.band)
    # Chunks fold back for as long as the shift leads before the start of a document.
    folded = self_parts(head_groups([Rule("fold", 64, 3 * 64)], 1), starts, TRITON_IMPL)
    assert len(folded) <= 4 * (1 if cu_seqlens is None else 5)
    assert all((x.diff() >= 0).all() for part in folded for x in part.band)


PATTERNS = [
    ({"pattern": "fixed", "chunk_size": 7}, "contiguous", 2, True),
    ({"pattern": "fixed", "chunk_size": 7}, "zigzag", 3, False),
    ({"pattern": "flow", "chunk_size": 5}, "zigzag", 2, True),
    ({"pattern": "flow", "wrap": "mask", "chunk_size": 5}, "contiguous", 3, False),
    ({"pattern": "s2", "chunk_size": 7}, "zigzag", 2, True),
    ({"pattern": "sda", "dilation": 3, "stagger": 1}, "zigzag", 2, True),
    ({"pattern": "sda", "dilation": 5}, "contiguous", 3, False),
    ({"pattern": "sda_key", "dilation": 4}, "zigzag", 3, True),
    ({"pattern": "sda_key", "dilation": 2}, "contiguous", 2, False),
    ({"pattern": "longmixed", "chunk_size": 11}, "zigzag", 2, False),
]


@pytest.mark.parametrize(
    ("words", "kind", "cp_size", "packed"), tiered(PATTERNS, range(0, len(PATTERNS), 2))
)
def test_exchanges_with_kernels_equal_those_with_torch(
    words: dict[str, Any],
    kind: str,
    cp_size: int,
    packed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variant = Variant("scca", SccaOptions(**words))
    # Every other key head alike, so that no one stride reaches their query heads.
    heads = (8, 4) if words.get("dilation") == 2 else (4, 2)
    more = {"packed": packed, "heads": heads, "dtype": torch.float32}
    problem = make(variant, kind, cp_size, at_least=48, **more)
    assert_ranks_of_kernels_are_right(problem, monkeypatch)


def test_what_no_kernel_takes_is_refused() -> None:
    for head_dim, dtype, says in [
        (16, torch.float64, "bf16, fp16 and fp32, the tensors are torch.float64"),
        (14, torch.float32, "even head_dim from 16 to 256, not 14"),
    ]:
        with pytest.raises(ValueError, match=says):
            scca_attention(*on_device(4, (4, 2), head_dim, dtype), rules=FEW, impl="triton")
    problem = make(Variant("scca", SccaOptions(chunk_size=7)), "contiguous", 2)
    with pytest.raises(ValueError, match="the tensors are torch.float64"):
        on_virtual_ranks(on_its_device(problem), "triton")


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_good_as_eager_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    assert_accurate(1000, head_dim, dtype, FEW)
    assert_accurate(1000, head_dim, dtype, (Rule("chunk", 200, 100), Rule("split", 300, 150)) * 2)


@pytest.mark.gpu
def test_the_same_bits_twice() -> None:
    qkv = on_device(3000, (8, 4), 64, torch.bfloat16)
    dout = torch.randn_like(qkv[0])
    assert_same_bits(
        lambda: with_grads(scca_attention(*qkv, rules=MIXED, impl="triton"), qkv, dout)
    )

"""Landmark attention under context parallelism: units of many tokens, bytes, refusals."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.attention import METHODS, HeadSlice, Shape, Traffic
from lcdist.attention.landmark import attention as landmark_module
from lcdist.config.schema import LandmarkOptions
from lcdist.exchange import VirtualGroup
from lcdist.layout import ContextLayout
from lcdist_kernels.landmark import TORCH_IMPL
from tests.attention.body import (
    Problem,
    Variant,
    assert_all_match,
    make,
    on_virtual_ranks,
    ranks_and_documents,
    whole,
)
from tests.attention.checks import assert_ranks_equal_reference, sent_and_planned

METHOD = METHODS["landmark"]
IMPLS = ["reference", "torch"]
# Units of one block, of several, of part of one; and more blocks requested than exist.
UNITS = [
    LandmarkOptions(block_size=4, top_k=2, select_tokens=4),
    LandmarkOptions(block_size=2, top_k=3, select_tokens=6),
    LandmarkOptions(block_size=6, top_k=1, select_tokens=3),
    LandmarkOptions(block_size=3, top_k=99, select_tokens=2),
]
BLOCKS = LandmarkOptions(block_size=4)


def problem_of(options: LandmarkOptions, cp_size: int, kind: str = "contiguous", **more) -> Problem:
    return make(Variant("landmark", options), kind, cp_size, **more)


def words(options: LandmarkOptions) -> str:
    return f"{options.block_size}-{options.top_k}-{options.select_tokens}"


@pytest.mark.parametrize(
    ("cp_size", "packed"),
    ranks_and_documents((1, True), (3, False), (8, True)),
)
@pytest.mark.parametrize("options", UNITS, ids=words)
def test_units_on_virtual_ranks_equal_reference(
    options: LandmarkOptions, cp_size: int, packed: bool
) -> None:
    assert_ranks_equal_reference(problem_of(options, cp_size, packed=packed))


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1)])
def test_units_with_grouped_heads(heads: tuple[int, int]) -> None:
    assert_ranks_equal_reference(problem_of(UNITS[1], 3, heads=heads, packed=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("cp_size", [1, 4])
def test_units_before_a_change_keep_their_bits(cp_size: int, impl: str) -> None:
    problem = problem_of(UNITS[1], cp_size)
    before = on_virtual_ranks(problem, impl)[0][0]
    for t in (7, 20, problem.layout.seqlen - 2):
        for i, x in enumerate(problem.qkv):
            changed = x.clone()
            changed[:, t:] = torch.randn_like(changed[:, t:])
            qkv = [*problem.qkv[:i], changed, *problem.qkv[i + 1 :]]
            out = on_virtual_ranks(dataclasses.replace(problem, qkv=qkv), impl)[0][0]
            assert torch.equal(out[:, : t // 6 * 6], before[:, : t // 6 * 6])
            assert not torch.equal(out[:, t:], before[:, t:])


@pytest.mark.parametrize("impl", IMPLS)
def test_documents_that_begin_inside_a_unit_do_not_leak(impl: str) -> None:
    problem = problem_of(LandmarkOptions(block_size=2, top_k=1, select_tokens=12), 2)
    problem.cu_seqlens = torch.tensor([0, 4, 10, 28], dtype=torch.int32)
    inside = torch.zeros(problem.layout.seqlen, dtype=torch.bool)
    inside[4:10] = True
    before = on_virtual_ranks(problem, impl)[0]
    assert_all_match(before, whole(problem))
    changed = [x.where(~inside[:, None, None], torch.randn_like(x)) for x in problem.qkv]
    after = on_virtual_ranks(dataclasses.replace(problem, qkv=changed), impl)[0]
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a[:, ~inside], b[:, ~inside])
        assert not torch.equal(a[:, inside], b[:, inside])


@pytest.mark.parametrize("unit", [1, 6])
def test_ties_are_broken_alike_on_any_number_of_ranks(unit: int) -> None:
    # Every landmark's key is one of three, so almost every selection is between equals.
    options = LandmarkOptions(block_size=2, top_k=2, select_tokens=unit)
    first = problem_of(options, 8, at_least=96)
    marks = first.qkv[1][:, 1:6:2].repeat(1, first.layout.seqlen // 6, 1, 1)
    first.qkv[1][:, 1::2] = marks
    first.inv_freq = None
    truth = whole(first)
    for cp_size in (1, 2, 4, 8):
        layout = dataclasses.replace(first.layout, cp_size=cp_size)
        problem = dataclasses.replace(first, layout=layout)
        for impl in IMPLS:
            assert_all_match(on_virtual_ranks(problem, impl)[0], truth)


def test_ranks_without_requests_equal_reference() -> None:
    # Every document is one block, so no query has past blocks.
    problem = problem_of(UNITS[0], 3)
    problem.cu_seqlens = torch.arange(0, problem.layout.seqlen + 1, 4, dtype=torch.int32)
    for impl in IMPLS:
        actual, sent = on_virtual_ranks(problem, impl)
        assert_all_match(actual, whole(problem))
        assert sent.backward == (0, 0, 0)


def test_gradients_of_shared_blocks_are_reproducible() -> None:
    problem = problem_of(UNITS[3], 5, dtype=torch.float32)
    first, again = (on_virtual_ranks(problem, "torch")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_block_per_rank() -> None:
    for options in (BLOCKS, LandmarkOptions(block_size=4, top_k=2, select_tokens=2)):
        problem = problem_of(options, 8, at_least=1)
        assert problem.layout.local_seqlen == 4
        for impl in IMPLS:
            assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


def test_future_pieces_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = []
    counting = TORCH_IMPL._replace(fwd=lambda *args: visits.append(1) or TORCH_IMPL.fwd(*args))
    monkeypatch.setattr(landmark_module, "select_landmark_impl", lambda *args: counting)
    problem = problem_of(BLOCKS, 4)
    assert_all_match(on_virtual_ranks(problem, "torch")[0], whole(problem))
    assert len(visits) == 1 + 2 + 3 + 4


def test_float16_gives_float16() -> None:
    for options in (BLOCKS, UNITS[0]):
        problem = problem_of(options, 2, dtype=torch.float16)
        for impl in IMPLS:
            assert all(x.dtype == torch.float16 for x in on_virtual_ranks(problem, impl)[0])


@pytest.mark.parametrize(("itemsize", "grad_size"), [(2, 4), (4, 4), (8, 8)])
def test_bytes_by_hand(itemsize: int, grad_size: int) -> None:
    shape = Shape(batch=1, nheads=4, nheads_kv=2, head_dim=8, itemsize=itemsize)
    layout = ContextLayout("contiguous", 36, 3)
    kv = 2 * 12 * 2 * 8
    ring = (2 * kv * itemsize,) * 3, (2 * kv * itemsize + 3 * kv * grad_size,) * 3
    assert METHOD.bytes(BLOCKS, shape, layout) == Traffic(*ring)
    # Two units a rank choose one block each for two key heads, of three blocks a rank. A landmark
    # is 8 elements a key head; counts of requests are 3 numbers to 2 peers.
    options = LandmarkOptions(block_size=4, top_k=1, select_tokens=6)
    always = 2 * 3 * 2 * 8 * itemsize + 2 * 3 * 8
    block = 2 * 4 * 8 * itemsize
    sent = METHOD.bytes(options, shape, layout)
    assert sent.forward == (always + 8 * block, always + 32 + 4 * block, always + 32)
    dblock = 2 * 4 * 8 * max(4, itemsize)
    assert sent.backward == (0, 4 * dblock, 4 * dblock)
    for each in (BLOCKS, options):
        assert METHOD.bytes(each, shape, ContextLayout("contiguous", 36, 1)) == ((0,), (0,))


@pytest.mark.parametrize("cp_size", [2, 3, 8])
@pytest.mark.parametrize("options", UNITS, ids=words)
def test_bytes_are_an_upper_bound_of_those_sent(options: LandmarkOptions, cp_size: int) -> None:
    problem = problem_of(options, cp_size, dtype=torch.bfloat16)
    for impl in IMPLS:
        sent, most = sent_and_planned(problem, impl)
        for counted, bound in zip(sent, most, strict=True):
            assert all(a <= b for a, b in zip(counted, bound, strict=True))
        if options.top_k == 99:
            assert sent == most


def test_only_selected_blocks_are_sent_once_per_rank() -> None:
    # All queries of a batch row and key head select block 0: one block goes to each other rank.
    problem = problem_of(LandmarkOptions(block_size=4, top_k=1, select_tokens=2), 3)
    problem.inv_freq = None
    q, k, _ = problem.qkv
    q.abs_()
    k[:, 3::4] = -k[:, 3::4].abs()
    k[:, 3] = 9
    sent = on_virtual_ranks(problem, "torch")[1]
    local = problem.layout.local_seqlen // 4
    always = 2 * (local * 2 * 2 * 16 * 8) + 2 * 3 * 8
    block = 2 * 2 * 2 * 4 * 16 * 8
    assert sent.forward == (always + 2 * block, always + 4 * 8, always + 4 * 8)
    assert sent.backward == (0, block, block)


def test_flops_by_hand() -> None:
    # 3 heads of 5; tokens of blocks of 3: 7, so the last has one. Own pairs: 1 + 2 + 2, twice, + 1.
    shape = Shape(batch=2, nheads=3, nheads_kv=1, head_dim=5, itemsize=2, seqlen=7)
    own, past = 5 + 5 + 1, 3 * 1 + 1 * 2
    assert METHOD.flops(LandmarkOptions(block_size=3), shape) == 2 * 3 * 5 * 2 * (
        2 * own + past * (3 + 2)
    )
    one = LandmarkOptions(block_size=3, top_k=1)
    assert METHOD.flops(one, shape) == 2 * 3 * 5 * 2 * (2 * own + (3 + 1) * (3 + 2) + past)
    with pytest.raises(ValueError, match="seqlen"):
        METHOD.flops(one, dataclasses.replace(shape, seqlen=None))


def test_multiples_of_the_sequence_length() -> None:
    assert METHOD.multiple_of(BLOCKS, 1) == METHOD.multiple_of(BLOCKS, 1, "zigzag") == 4
    assert METHOD.multiple_of(BLOCKS, 3) == 12 and METHOD.multiple_of(BLOCKS, 3, "zigzag") == 24
    units = LandmarkOptions(block_size=4, top_k=1, select_tokens=6)
    # On one rank the last unit may be short.
    assert METHOD.multiple_of(units, 1) == 4 and METHOD.multiple_of(units, 3) == 36
    assert METHOD.layouts_for(BLOCKS) == ("contiguous", "zigzag")
    assert METHOD.layouts_for(units) == ("contiguous",)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"options": LandmarkOptions(block_size=7)}, "block_size = 7 .* 24 consecutive tokens"),
    (
        {"options": LandmarkOptions(block_size=4, top_k=1)},
        "select_tokens = 4096 .* 24 consecutive tokens .* divisor of 24",
    ),
    (
        {
            "options": LandmarkOptions(block_size=4, top_k=1, select_tokens=4),
            "layout": ContextLayout("zigzag", 48, 2),
        },
        "'zigzag'.* top_k = 1 goes with contiguous",
    ),
    ({"layout": ContextLayout("striped", 48, 2)}, "'striped'.* contiguous, zigzag"),
    ({"layout": ContextLayout("zigzag", 48, 2), "options": LandmarkOptions(block_size=8)}, "12"),
    (
        {"cu_seqlens": torch.tensor([0, 8, 9, 20], dtype=torch.int32)},
        "document 2 begins at token 9.* block_size = 4",
    ),
    ({"cu_seqlens": torch.tensor([0, 47], dtype=torch.int32)}, "document 1 begins at token 47"),
    ({"cu_seqlens": torch.tensor([0, 49], dtype=torch.int32)}, "seqlen = 48"),
    (
        {
            "options": LandmarkOptions(block_size=4, top_k=1, select_tokens=4),
            "heads": HeadSlice(0, 16, 0, 2),
        },
        "top_k = 1 .* 8 query heads .* tp_size that divides nheads_kv = 2",
    ),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_conflicting_arguments_are_refused_by_name(change: dict[str, Any], says: str) -> None:
    held = (4, 1) if "heads" in change else (4, 2)
    call = {
        "options": BLOCKS,
        "layout": ContextLayout("contiguous", 48, 2),
        "group": VirtualGroup(2)[0],
        "heads": None,
    }
    q, k, v = (torch.randn(1, 24, n, 16) for n in (held[0], held[1], held[1]))
    with pytest.raises(ValueError, match=says):
        METHOD.attention(q, k, v, **(call | change))
    if "layout" in change or "heads" in change or "options" in change:
        given = call | change
        heads = given["heads"] or HeadSlice(0, 4, 0, 2)
        with pytest.raises(ValueError, match=says):
            METHOD.check(given["options"], given["layout"], heads, 4 if given["heads"] else 1)


def test_documents_must_begin_with_a_block_also_on_one_rank() -> None:
    problem = problem_of(BLOCKS, 1)
    problem.cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="document 1 begins at token 5"):
        on_virtual_ranks(problem, "torch")
    assert whole(problem)[0].shape == problem.qkv[0].shape


def test_dense_form_allows_groups_split_over_ranks() -> None:
    problem = problem_of(BLOCKS, 2, heads=(8, 2))
    truth = whole(problem)[0]
    for first in (0, 2, 4, 6):
        heads, kv = HeadSlice(first, 8, first // 4, 2), slice(first // 4, first // 4 + 1)
        q, k, v = problem.qkv
        mine: list[Tensor] = [q[:, :, first : first + 2], k[:, :, kv], v[:, :, kv]]
        part = dataclasses.replace(
            problem, heads=heads, qkv=mine, dout=problem.dout[:, :, first : first + 2]
        )
        actual = on_virtual_ranks(part, "torch")[0]
        assert_all_match(actual[:1], [truth[:, :, first : first + 2]])
    METHOD.check(BLOCKS, problem.layout, HeadSlice(0, 8, 0, 2), 4)

"""Tensorized attention under context parallelism: other options, bytes, decode, refusals."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from lcdist.attention import METHODS, HeadSlice, Shape, Traffic
from lcdist.attention.tensorized import units as tensorized_units
from lcdist.attention.tensorized.plan import (
    count_halo_tokens,
    count_units,
    make_halo_plan,
    reverse_halo_plan,
)
from lcdist.config.schema import TensorizedOptions
from lcdist.exchange import VirtualGroup
from lcdist.layout import ContextLayout
from lcdist_kernels import full_reference
from lcdist_kernels.tensorized import ModeGrid
from lcdist_kernels.tensorized import impl as operator
from tests.attention.body import (
    Problem,
    Variant,
    assert_all_match,
    make,
    on_virtual_ranks,
    ranks_and_documents,
    whole,
)
from tests.attention.checks import (
    assert_evaluation_sends_what_training_sends,
    assert_ranks_equal_reference,
    sent_and_planned,
)
from tests.tolerance import assert_matches

METHOD = METHODS["tensorized"]
IMPLS = ("reference", "torch")
OTHERS = [
    TensorizedOptions(modes=(4,), local_blocks=4, pe="global"),
    TensorizedOptions(modes=(2,), local_blocks=40, hop_heads="kv"),
    TensorizedOptions(modes=(1,), local_blocks=1),
    TensorizedOptions(modes=(2, 3, 2), local_blocks=1, hop_heads="q"),
    TensorizedOptions(modes=()),
]


def name(options: TensorizedOptions) -> str:
    words = (options.modes, options.local_blocks, options.pe, options.hop_heads)
    return "-".join(f"{word}".replace(" ", "") for word in words)


def problem_of(options: TensorizedOptions, cp_size: int, **more: Any) -> Problem:
    return make(Variant("tensorized", options), "contiguous", cp_size, **more)


@pytest.mark.parametrize("options", OTHERS, ids=name)
@pytest.mark.parametrize(
    ("cp_size", "packed"),
    ranks_and_documents((2, True), (3, False), (8, True)),
)
def test_other_options_on_virtual_ranks_equal_reference(
    cp_size: int, packed: bool, options: TensorizedOptions
) -> None:
    assert_ranks_equal_reference(problem_of(options, cp_size, packed=packed))


@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("hop_heads", ["q", "kv"])
def test_hops_by_query_head_or_by_group(hop_heads: str, heads: tuple[int, int]) -> None:
    options = TensorizedOptions(modes=(3,), hop_heads=hop_heads)  # pyright: ignore
    assert_ranks_equal_reference(problem_of(options, 3, heads=heads))


@pytest.mark.parametrize("cp_size", [1, 4])
def test_without_modes_or_with_enough_local_blocks_it_is_full_attention(cp_size: int) -> None:
    for options in (OTHERS[1], OTHERS[4]):
        problem = problem_of(options, cp_size, packed=True)
        asked = {key: problem.keywords()[key] for key in ("rotary", "cu_seqlens", "softmax_scale")}
        for impl in IMPLS:
            out = on_virtual_ranks(problem, impl)[0][0]
            assert_matches(out, full_reference(*problem.qkv, **asked))


def test_more_ranks_than_offsets_and_heads() -> None:
    # Units are 2 offsets of 1 key head, so six of eight ranks have none.
    options = TensorizedOptions(modes=(2,), local_blocks=1)
    problem = problem_of(options, 8, heads=(2, 1), at_least=16)
    assert count_units(ModeGrid((2,)), 1, 8) == [0, 0, 0, 1, 0, 0, 0, 1]
    assert problem.layout.local_seqlen == 2
    for impl in IMPLS:
        assert_all_match(on_virtual_ranks(problem, impl)[0], whole(problem))


def test_units_are_divided_evenly() -> None:
    assert count_units(ModeGrid((5, 3)), 2, 4) == [7, 8, 7, 8]
    for cp_size in range(1, 9):
        sizes = count_units(ModeGrid((7,)), 3, cp_size)
        assert sum(sizes) == 21 and max(sizes) - min(sizes) <= 1


def test_halo_plan_by_hand() -> None:
    # Shards of 6 tokens, blocks of 3: two blocks back are one rank back, three are two.
    assert make_halo_plan(ModeGrid((3,)), 6, 3) == []
    assert make_halo_plan(ModeGrid((3,), local_blocks=2), 6, 3) == [(0, 1, 3, 6), (1, 2, 3, 6)]
    plan = make_halo_plan(ModeGrid((3,), local_blocks=4), 6, 3)
    assert plan == [(0, 1, 0, 6), (0, 2, 3, 6), (1, 2, 0, 6)]
    assert reverse_halo_plan(plan) == [(1, 0, 0, 6), (2, 0, 0, 3), (2, 1, 3, 9)]
    assert [count_halo_tokens(plan, rank) for rank in range(3)] == [0, 6, 9]


@pytest.mark.parametrize(("itemsize", "wide"), [(2, 4), (4, 4), (8, 8)])
def test_bytes_by_hand(itemsize: int, wide: int) -> None:
    # 2 ranks of 4 blocks of 3 tokens; 6 units, 3 a rank; 4 query heads, 2 key heads of 8.
    shape = Shape(batch=1, nheads=4, nheads_kv=2, head_dim=8, itemsize=itemsize)
    options = TensorizedOptions(modes=(3,), hop_heads="q", local_blocks=2)
    counted = METHOD.bytes(options, shape, ContextLayout("contiguous", 24, 2))
    tokens = 12 // 2  # of 12, the half with units on the other rank
    forward = tokens * 8 * (4 + 2 + 4 + 4) * itemsize + tokens * 4 * wide
    backward = tokens * 8 * (4 + 4 + 2 + 4) * itemsize + 2 * tokens * 4 * wide
    halo = 3 * 2 * 2 * 8  # rank 0's last block, keys and values, and their gradients from rank 1
    assert counted == Traffic(
        (forward + halo * itemsize, forward), (backward, backward + halo * wide)
    )
    by_group = dataclasses.replace(options, hop_heads="kv", local_blocks=1)
    less = METHOD.bytes(by_group, shape, ContextLayout("contiguous", 24, 2))
    saved = tokens * 8 * 2 * itemsize
    assert less == Traffic((forward - saved,) * 2, (backward - saved,) * 2)
    assert METHOD.bytes(options, shape, ContextLayout("contiguous", 24, 1)) == Traffic((0,), (0,))


def test_bytes_are_the_formula_of_the_specification() -> None:
    # (N / P) d (h [q] + h_kv [k] + h_u [U] + h [out]) (P - 1) / P elements, and h scalars a token.
    shape = Shape(batch=1, nheads=32, nheads_kv=8, head_dim=128, itemsize=2)
    options = TensorizedOptions(local_blocks=1)
    layout = ContextLayout("contiguous", 1 << 20, 16)
    heads = 32 + 8 + 8 + 32
    tokens = (1 << 20) // 16 * 15 // 16
    expected = tokens * (128 * heads * 2 + 32 * 4)
    assert METHOD.bytes(options, shape, layout).forward == (expected,) * 16


@pytest.mark.parametrize("cp_size", [2, 5, 8])
@pytest.mark.parametrize("options", OTHERS, ids=name)
def test_bytes_of_other_options_are_those_sent(options: TensorizedOptions, cp_size: int) -> None:
    sent, planned = sent_and_planned(problem_of(options, cp_size, dtype=torch.bfloat16), "torch")
    assert sent == planned
    assert "ring" not in METHOD.exchange


def test_evaluation_sends_as_much_as_training_sends_forward() -> None:
    assert_evaluation_sends_what_training_sends(problem_of(TensorizedOptions(modes=(3,)), 3))


def test_messages_are_posted_as_early_as_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, events = problem_of(TensorizedOptions(modes=(3,)), 2), []

    def noted(verb: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **words: Any) -> Any:
            events.append(verb)
            return plain(*args, **words)

        return call

    def watched(where: Any, verb: str) -> None:
        monkeypatch.setattr(where, verb, noted(verb, getattr(where, verb)))

    for verb in ("swap", "shift"):
        watched(tensorized_units, verb)
    tiled = operator.TORCH_IMPL
    own: dict[str, Callable[..., Any]] = {
        verb: noted(verb, getattr(tiled, verb))
        for verb in ("hop_fwd", "branch_fwd", "branch_bwd", "hop_bwd")
    }
    monkeypatch.setattr(operator, "TORCH_IMPL", tiled._replace(**own))
    on_virtual_ranks(problem, "torch")
    # Of two ranks, so each event twice; between exchanges nobody waits for the other's events.
    forward = ["swap", "shift", "hop_fwd", "swap", "branch_fwd", "branch_fwd", "swap", "swap"]
    backward = ["swap", "swap", "branch_bwd", "swap", "branch_bwd", "shift", "hop_bwd"]
    assert sorted(events) == sorted(2 * (forward + backward))
    alone = [event for event in events if event != "swap"]
    assert alone.index("shift") < alone.index("hop_fwd") < alone.index("branch_fwd")
    assert events[0] == "swap" and events.index("hop_fwd") > 1


@pytest.mark.parametrize(("heads", "hop_heads"), [((8, 2), "q"), ((8, 4), "kv")])
def test_some_heads_equal_those_of_the_whole_model(heads: tuple[int, int], hop_heads: str) -> None:
    # Two query heads of one key head: of a group of four only with hops by query head.
    options = TensorizedOptions(modes=(3,), hop_heads=hop_heads)  # pyright: ignore
    problem = problem_of(options, 3, heads=heads)
    truth, group = whole(problem), heads[0] // heads[1]
    for first in (0, 2, 6):
        mine, kv = slice(first, first + 2), slice(first // group, first // group + 1)
        part = dataclasses.replace(
            problem,
            heads=HeadSlice(first, heads[0], first // group, heads[1]),
            qkv=[
                x[:, :, cut].contiguous()
                for x, cut in zip(problem.qkv, (mine, kv, kv), strict=True)
            ],
            dout=problem.dout[:, :, mine],
        )
        for impl in IMPLS:
            actual = on_virtual_ranks(part, impl)[0]
            assert_all_match(actual[:2], [x[:, :, mine] for x in truth[:2]])
            # The gradient of a bias that is given whole has zeros at heads of other ranks.
            expected = torch.zeros_like(truth[4])
            expected[:, mine] = truth[4][:, mine]
            assert_matches(actual[4], expected)


def test_hop_heads_follow_the_model_not_the_tensor() -> None:
    # Four query heads a key head: by group, which a rank with two of them cannot.
    options = TensorizedOptions(modes=(3,))
    whole_group = problem_of(options, 2, heads=(8, 2))
    by_group = dataclasses.replace(
        whole_group, options=dataclasses.replace(options, hop_heads="kv")
    )
    by_head = dataclasses.replace(whole_group, options=dataclasses.replace(options, hop_heads="q"))
    out = whole(whole_group)[0]
    assert torch.equal(out, whole(by_group)[0]) and not torch.equal(out, whole(by_head)[0])
    two = make(Variant("tensorized", options), "contiguous", 1, heads=(2, 1))
    part = dataclasses.replace(two, params=None, heads=HeadSlice(2, 8, 0, 2))
    says = (
        "hop_heads = 'auto': .* group of 4 query heads, of which this rank holds 2.*nheads_kv = 2"
    )
    for run in (lambda: whole(part), lambda: on_virtual_ranks(part, "torch")):
        with pytest.raises(ValueError, match=says):
            run()
    layout, heads = two.layout, HeadSlice(0, 8, 0, 2)
    METHOD.check(options, layout, heads, 2)
    with pytest.raises(ValueError, match=says):
        METHOD.check(options, layout, heads, 4)
    METHOD.check(dataclasses.replace(options, hop_heads="q"), layout, heads, 4)


@pytest.mark.parametrize(
    ("options", "layout", "says"),
    [
        ({"modes": (2, 2)}, ("contiguous", 16, 2), "local_blocks = 2 with modes"),
        ({"modes": (2,)}, ("zigzag", 16, 2), "layout kind 'zigzag'.*contiguous"),
        ({"modes": (3,)}, ("contiguous", 16, 2), "a shard has 8 tokens.*multiple of 3.* of 6"),
    ],
)
def test_conflicting_options_are_refused(
    options: Mapping[str, Any], layout: tuple[str, int, int], says: str
) -> None:
    chosen, cut = TensorizedOptions(**options), ContextLayout(*layout)
    q = torch.randn(1, cut.local_seqlen, 2, 8)
    with pytest.raises(ValueError, match=says):
        METHOD.attention(q, q, q, options=chosen, layout=cut, group=VirtualGroup(2)[0])
    with pytest.raises(ValueError, match=says):
        METHOD.check(chosen, cut, HeadSlice(0, 2, 0, 2), 1)


def test_documents_and_params_that_do_not_fit_are_refused() -> None:
    problem = problem_of(TensorizedOptions(modes=(3,)), 2)
    asked = problem.keywords() | {"layout": problem.layout, "group": VirtualGroup(2)[0]}
    shards = [problem.layout.shard(x, 0, 1) for x in problem.qkv]
    for change, says in [
        ({"cu_seqlens": torch.tensor([0, 3, 13])}, "document 2 starts at token 13.*10 tokens.* 3;"),
        ({"params": {"branch_bias": torch.zeros(2, 4)}}, r"branch_bias of shape \(2, 4\)"),
        ({"params": {"branch_bias": torch.zeros(1, 3)}}, r"expected \[1, 4\]"),
        ({"options": TensorizedOptions(modes=()), "params": {"branch_bias": 0}}, "no learnable"),
    ]:
        with pytest.raises(ValueError, match=says):
            METHOD.attention(*shards, **(asked | change))


def test_bias_starts_at_log_strides() -> None:
    options = TensorizedOptions(modes=(4, 3), local_blocks=1)
    assert METHOD.parameters(options, 6) == {"branch_bias": (2, 6)}
    bias = METHOD.initial(options, 6)["branch_bias"]
    assert bias.dtype == torch.float32
    assert torch.equal(bias[:, 5], torch.tensor([4.0, 12.0], dtype=torch.float64).log().float())
    assert METHOD.parameters(TensorizedOptions(modes=()), 6) == {}
    problem = problem_of(options, 3)
    given = dataclasses.replace(
        problem, params={"branch_bias": torch.tensor([[4.0] * 4, [12.0] * 4]).double().log()}
    )
    silent = dataclasses.replace(problem, params=None)
    for impl in IMPLS:
        assert_all_match(on_virtual_ranks(silent, impl)[0], on_virtual_ranks(given, impl)[0][:4])


def test_multiples() -> None:
    for options, block in ((OTHERS[0], 4), (OTHERS[3], 12), (OTHERS[4], 1)):
        assert [METHOD.multiple_of(options, cp) for cp in (1, 2, 5)] == [
            block,
            2 * block,
            5 * block,
        ]


def test_flops_by_hand() -> None:
    # 7 tokens, blocks of 2, heads of 5. Own block: 4 x 1 + 3 x 2 pairs; the other branch
    # 0 0 1 1 2 2 3; hops over 8 tokens of 2.
    shape = Shape(batch=2, nheads=4, nheads_kv=2, head_dim=5, itemsize=2, seqlen=7)
    options = TensorizedOptions(modes=(2,), local_blocks=1)
    assert METHOD.flops(options, shape) == 2 * 4 * 5 * (4 * (10 + 9) + 4 * 16)
    by_group = dataclasses.replace(options, hop_heads="kv")
    assert METHOD.flops(by_group, shape) == 2 * 4 * 5 * (4 * (10 + 9) + 2 * 16)
    # Two local blocks: 1 2 3 4 3 4 3 pairs, then 0 0 0 0 1 1 2.
    near = dataclasses.replace(options, local_blocks=2)
    assert METHOD.flops(near, shape) == 2 * 4 * 5 * (4 * (20 + 4) + 4 * 16)
    three = TensorizedOptions(modes=(2, 2), local_blocks=1)
    # Middle branch 0 0 1 1 0 0 1, coarsest 0 0 0 0 1 1 1; two hops over 8 tokens of 2.
    assert METHOD.flops(three, shape) == 2 * 4 * 5 * (4 * (10 + 3 + 3) + 4 * 32)
    assert METHOD.flops(TensorizedOptions(modes=()), shape) == 2 * 4 * 5 * 4 * 28


def test_float16_gives_float16() -> None:
    for options in (OTHERS[0], OTHERS[3], OTHERS[4]):
        problem = problem_of(options, 2, dtype=torch.float16)
        for impl in IMPLS:
            assert all(x.dtype == torch.float16 for x in on_virtual_ranks(problem, impl)[0])

"""SCCA under context parallelism: rules of heads, shift plans, results, bytes, refusals."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from lcdist.attention import METHODS, HeadSlice, Shape
from lcdist.attention.scca import ring as scca_ring
from lcdist.attention.scca import shift as scca_shift
from lcdist.attention.scca import swap as scca_swap
from lcdist.attention.scca.pattern import check_documents, longmixed_units, model_rules
from lcdist.attention.scca.shift_plan import Documents, make_shift_plan, visible_spans
from lcdist.attention.scca.units import DilatedHeads, UnitLayout
from lcdist.config.schema import SccaOptions
from lcdist.exchange import Pending, VirtualGroup, group_rank, shift, traffic
from lcdist.layout import ContextLayout
from lcdist_kernels.common import document_starts
from lcdist_kernels.scca import Rule, dense_mask
from tests.attention.body import Problem, Variant, assert_all_match, make, on_virtual_ranks, whole
from tests.saved import saved_bytes

METHOD = METHODS["scca"]
IMPLS = ("reference", "torch")
KINDS = ("contiguous", "zigzag")


def options(**words: Any) -> SccaOptions:
    return SccaOptions(**words)


def problem_of(words: Mapping[str, Any], kind: str, cp_size: int, **more: Any) -> Problem:
    return make(Variant("scca", options(**words)), kind, cp_size, **more)


def shifts(nheads: int, nheads_kv: int, **words: Any) -> list[int]:
    return [rule.shift for rule in model_rules(options(**words), nheads, nheads_kv)]


def test_units_are_key_heads_if_there_are_four() -> None:
    fixed = {"pattern": "fixed", "chunk_size": 8}
    assert shifts(8, 8, **fixed) == shifts(8, 4, **fixed) == [0] * 4 + [4] * 4
    assert shifts(8, 2, **fixed) == shifts(8, 1, **fixed) == [0] * 4 + [4] * 4
    assert shifts(5, 5, **fixed) == [0, 0, 4, 4, 4]
    assert shifts(3, 1, **fixed) == [0, 4, 4] and shifts(1, 1, **fixed) == [0]
    flow = {"pattern": "flow", "chunk_size": 8}
    assert shifts(8, 4, **flow) == [0, 0, 8, 8, 16, 16, 24, 24]
    assert shifts(6, 3, **flow) == [0, 8, 16, 24, 32, 40]
    assert shifts(4, 4, **flow, stagger=3) == [24, 32, 40, 48]
    for pattern in ("sda", "sda_key"):
        assert shifts(8, 4, pattern=pattern, dilation=3) == [0, 0, 1, 1, 2, 2, 0, 0]
        assert shifts(4, 2, pattern=pattern, dilation=3, stagger=1) == [1, 2, 0, 1]


def test_kinds_of_rules_and_default_shifts() -> None:
    def kinds(**words: Any) -> list[str]:
        return [rule.kind for rule in model_rules(options(**words), 4, 4)]

    assert kinds(pattern="flow") == ["fold"] * 4
    assert kinds(pattern="flow", wrap="mask") == ["chunk"] * 4
    assert kinds(pattern="fixed", shift=4096, wrap="fold") == ["chunk", "chunk", "fold", "fold"]
    assert kinds(pattern="s2") == ["chunk", "chunk", "split", "split"]
    assert kinds(pattern="sda") == ["pair"] * 4 and kinds(pattern="sda_key") == ["key"] * 4
    assert shifts(4, 4) == [0, 0, 1024, 1024] == shifts(4, 4, pattern="s2")
    assert shifts(4, 4, chunk_size=7) == [0, 0, 3, 3]
    assert shifts(4, 4, chunk_size=7, shift=99) == [0, 0, 99, 99]


def test_longmixed_splits_units_by_fractions() -> None:
    rules = model_rules(options(pattern="longmixed", chunk_size=8), 16, 16)
    fixed = [Rule("chunk", 8)] * 4 + [Rule("chunk", 8, 4)] * 4
    sparse = [Rule("pair", 2, s) for s in (0, 1, 0, 1)]
    assert list(rules) == [*fixed, *sparse, *(Rule("pair", 4, s) for s in range(4))]
    few = model_rules(options(pattern="longmixed", chunk_size=8), 4, 2)
    assert few == (Rule("chunk", 8), Rule("chunk", 8, 4), Rule("pair", 2), Rule("pair", 4))
    for fractions, units, expected in [
        ((0.5, 0.25, 0.25), 6, (3, 2, 1)),
        ((0.5, 0.25, 0.25), 5, (3, 1, 1)),
        ((1 / 3, 1 / 3, 1 / 3), 4, (2, 1, 1)),
        ((0.3, 0.3, 0.4), 7, (2, 2, 3)),
        ((0.2, 0.45, 0.35), 10, (2, 5, 3)),
        ((0.1, 0.2, 0.7), 10, (1, 2, 7)),
        ((0.0, 0.0, 1.0), 9, (0, 0, 9)),
    ]:
        shared = longmixed_units(options(pattern="longmixed", fractions=fractions), units)
        assert shared == expected


def test_layers_are_staggered() -> None:
    def turns(layer: int, heads: tuple[int, int] = (8, 4), **words: Any) -> int:
        return METHOD.for_layer(options(**words), layer, *heads).stagger

    for words in ({"pattern": "flow"}, {"pattern": "sda"}, {"pattern": "sda_key", "stagger": 0}):
        assert [turns(layer, **words) for layer in range(3)] == [0, 4, 8]
        assert turns(2, (6, 2), **words) == 12
    assert turns(3, pattern="sda", stagger=5) == 17
    for words in ({"pattern": "fixed"}, {"pattern": "s2"}, {"pattern": "longmixed"}):
        assert METHOD.for_layer(options(**words), 7, 8, 4) == options(**words)
    masked = options(pattern="flow", wrap="mask")
    assert METHOD.for_layer(masked, 7, 8, 4) == masked


REFUSED = [
    ({"pattern": "sideways"}, "pattern = 'sideways'"),
    ({"chunk_size": 0}, "chunk_size = 0"),
    ({"pattern": "sda", "dilation": 0}, "dilation = 0"),
    ({"wrap": "bidir"}, "wrap = 'bidir'"),
    ({"shift": -1}, "shift = -1"),
    *(
        ({"pattern": p, "shift": 8}, "shift = 8 has no meaning .*fixed, longmixed")
        for p in ("flow", "sda", "sda_key", "s2")
    ),
    *(
        ({"pattern": p, "wrap": "mask"}, "wrap = 'mask' has no meaning")
        for p in ("sda", "sda_key", "s2")
    ),
    *(
        ({"pattern": p, "stagger": 1}, "stagger = 1 has no meaning")
        for p in ("fixed", "longmixed", "s2")
    ),
    ({"pattern": "flow", "wrap": "mask", "stagger": 4}, "stagger = 4 .* no unit with shift 0"),
    ({"wrap": "fold", "chunk_size": 8}, "shift = 4 is not a multiple of chunk_size = 8"),
    ({"wrap": "fold", "chunk_size": 8, "shift": 12}, "shift = 12 is not a multiple"),
    ({"pattern": "longmixed", "fractions": (0.5, 0.5)}, "fractions = .* three"),
    ({"pattern": "longmixed", "fractions": (0.5, 0.5, 0.5)}, "sum to 1"),
    ({"pattern": "longmixed", "fractions": (1.5, -0.5, 0.0)}, "at least 0"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED)
def test_conflicting_options_are_refused_everywhere(words: dict[str, Any], says: str) -> None:
    wrong = options(**words)
    problem = make("scca", "contiguous", 2)
    q, k, v = problem.qkv
    shards = [problem.layout.shard(x, 0, 1) for x in problem.qkv]
    shape = Shape(2, 4, 2, 16, 8, seqlen=64)
    for call in (
        lambda: METHOD.reference(q, k, v, options=wrong),
        lambda: METHOD.attention(
            *shards, options=wrong, layout=problem.layout, group=VirtualGroup(2)[0]
        ),
        lambda: METHOD.check(wrong, problem.layout, HeadSlice(0, 4, 0, 2), 1),
        lambda: METHOD.flops(wrong, shape),
        lambda: METHOD.bytes(wrong, shape, problem.layout),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_longmixed_without_four_units_is_refused() -> None:
    mixed = options(pattern="longmixed", chunk_size=8)
    problem = make("scca", "contiguous", 2, heads=(3, 3))
    shards = [problem.layout.shard(x, 0, 1) for x in problem.qkv]
    layout, group = problem.layout, VirtualGroup(2)[0]
    for call in (
        lambda: METHOD.reference(*problem.qkv, options=mixed),
        lambda: METHOD.attention(*shards, options=mixed, layout=layout, group=group),
        lambda: METHOD.check(mixed, layout, HeadSlice(0, 3, 0, 3), 1),
    ):
        with pytest.raises(ValueError, match="longmixed.* 4 query heads.*nheads = 3"):
            call()
    # Four units in the whole model are enough, however few this tensor holds.
    slim = [x[:, :, :1] for x in problem.qkv]
    METHOD.reference(*slim, options=mixed, heads=HeadSlice(3, 4, 3, 4))


def test_striped_layout_is_refused() -> None:
    layout = ContextLayout("striped", 64, 2)
    qkv = [torch.randn(1, 32, 4, 8) for _ in range(3)]
    for pattern in ("fixed", "sda", "sda_key"):
        with pytest.raises(ValueError, match="'striped'.*contiguous or zigzag"):
            METHOD.attention(
                *qkv, options=options(pattern=pattern), layout=layout, group=VirtualGroup(2)[0]
            )
        with pytest.raises(ValueError, match="'striped'.*contiguous or zigzag"):
            METHOD.check(options(pattern=pattern), layout, HeadSlice(0, 4, 0, 4), 1)


def test_flow_under_mask_refuses_documents_with_fewer_chunks_than_units() -> None:
    masked = options(pattern="flow", wrap="mask", chunk_size=10)
    heads = HeadSlice(0, 4, 0, 4)
    for seqlen in (31, 40, 400):
        check_documents(masked, heads, seqlen)
    short = r"unit 3 of 4 .* document 0 of 30 tokens has only 3 of chunk_size = 10"
    problem = make("scca", "contiguous", 2, at_least=30, heads=(4, 4))
    assert problem.layout.seqlen == 30
    shards = [problem.layout.shard(x, 0, 1) for x in problem.qkv]
    for call in (
        lambda: check_documents(masked, heads, 30),
        lambda: METHOD.reference(*problem.qkv, options=masked),
        lambda: METHOD.attention(
            *shards, options=masked, layout=problem.layout, group=VirtualGroup(2)[0]
        ),
        lambda: METHOD.check(masked, problem.layout, heads, 1),
        lambda: METHOD.flops(masked, Shape(1, 4, 4, 16, 8, seqlen=30)),
    ):
        with pytest.raises(ValueError, match=short):
            call()
    # Every document counts, except empty ones and the padding after the last border.
    check_documents(masked, heads, 100, (0, 31, 31, 80))
    with pytest.raises(ValueError, match="document 1 of 30 tokens"):
        check_documents(masked, heads, 100, (0, 31, 61, 100))
    for other in (options(pattern="flow", chunk_size=10), options(chunk_size=10)):
        check_documents(other, heads, 30)


def visible_tokens(
    rules: Sequence[Rule], layout: ContextLayout, rank: int, documents: Documents
) -> list[int]:
    """Return the tokens that any of a rank's queries sees, from the dense mask."""
    index, k_index = layout.positions(rank), torch.arange(layout.seqlen)
    cu_seqlens = None if documents is None else torch.tensor(documents)
    starts, k_starts = (document_starts(cu_seqlens, x, layout.seqlen) for x in (index, k_index))
    mask = dense_mask(rules, index, starts, k_index, k_starts)
    return mask.any(0).any(0).nonzero().flatten().tolist()


WINDOWS = [
    (Rule("chunk", 8),),
    (Rule("chunk", 8, 4),),
    (Rule("chunk", 8, 24),),
    (Rule("chunk", 7, 3),),
    (Rule("chunk", 40, 13),),
    (Rule("chunk", 5), Rule("chunk", 12, 30)),
    (Rule("fold", 6, 24),),
    (Rule("split", 16, 8),),
]


@pytest.mark.parametrize("documents", [None, (0, 1, 1, 30, 77)])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_shift_plan_sends_exactly_what_the_mask_shows(
    kind: str, cp_size: int, documents: Documents
) -> None:
    layout = ContextLayout(kind, 96, cp_size)
    for rules in WINDOWS:
        plan = make_shift_plan(rules, layout, documents)
        for rank in range(cp_size):
            visible = visible_tokens(rules, layout, rank, documents)
            spans = visible_spans(rules, layout, rank, documents)
            assert [t for span in spans for t in range(*span)] == visible
            own = set(layout.positions(rank).tolist())
            received = [
                int(t)
                for src, dst, start, stop in plan.intervals
                for t in layout.positions(src)[start:stop]
                if dst == rank
            ]
            assert received == [t for t in visible if t not in own]
            assert plan.received_ids(rank).tolist() == received
        assert all(src != dst and start < stop for src, dst, start, stop in plan.intervals)


def test_reversed_shift_plan_returns_tokens_to_their_source() -> None:
    layout = ContextLayout("zigzag", 96, 4)
    plan = make_shift_plan((Rule("chunk", 7, 30),), layout)

    def run(rank: Any) -> None:
        own = layout.positions(rank.rank())
        received = shift(own[None, :, None, None], plan.intervals, rank).wait().flatten()
        assert torch.equal(received, plan.received_ids(rank.rank()))
        returned = shift(received[None, :, None, None], plan.reversed(), rank).wait()
        sent = [own[start:stop] for start, stop in plan.send_ranges(rank.rank())]
        assert torch.equal(returned.flatten(), torch.cat([torch.arange(0), *sent]))

    VirtualGroup(4).run(run)


@pytest.mark.parametrize("delay", [0, 1, 4, 8, 11, 24, 64, 200])
@pytest.mark.parametrize("chunk_size", [4, 8])
def test_shift_plan_has_few_peers(chunk_size: int, delay: int) -> None:
    for kind, most in (("contiguous", 2), ("zigzag", 4)):
        for cp_size in (2, 4, 8):
            layout = ContextLayout(kind, 16 * cp_size, cp_size)
            plan = make_shift_plan((Rule("chunk", chunk_size, delay),), layout).intervals
            for rank in range(cp_size):
                assert len({src for src, dst, _, _ in plan if dst == rank}) <= most
                assert len({dst for src, dst, _, _ in plan if src == rank}) <= most


def received(rule: Rule, layout: ContextLayout) -> list[int]:
    plan = make_shift_plan((rule,), layout).intervals
    return [
        sum(stop - start for _, dst, start, stop in plan if dst == rank)
        for rank in range(layout.cp_size)
    ]


def test_tokens_received_are_those_of_the_specification() -> None:
    zigzag = ContextLayout("zigzag", 256, 4)
    assert received(Rule("chunk", 16, 8), zigzag) == [8, 16, 16, 8]
    assert received(Rule("chunk", 16, 32), zigzag) == [32, 64, 64, 32]
    # P = 8, n = 16 chunks: 0.44 L a head and rank under mask, 0.66 L under fold.
    layout = ContextLayout("contiguous", 256, 8)
    for kind, share in (("chunk", 0.44), ("fold", 0.66)):
        tokens = sum(sum(received(Rule(kind, 16, 16 * m), layout)) for m in range(16))
        assert round(tokens / (16 * 8 * 32), 2) == share
    for delay in (0, 5, 16, 40, 100):
        for rank, tokens in enumerate(received(Rule("chunk", 16, delay), layout)):
            begin, end = 32 * rank, 32 * rank + 32
            assert tokens == max(0, min(end - delay, begin) - max(0, begin - delay))


def test_fixed_sends_as_much_whatever_the_length_and_the_ranks() -> None:
    shape = Shape(batch=3, nheads=16, nheads_kv=8, head_dim=64, itemsize=2)
    fixed = options(chunk_size=128)
    forward, backward = 3 * 64 * 8 * 64 * 2, 3 * 64 * 8 * 64 * 4
    for cp_size, local in ((2, 128), (4, 128), (8, 1024), (64, 256)):
        layout = ContextLayout("contiguous", cp_size * local, cp_size)
        counted = METHOD.bytes(fixed, shape, layout)
        assert counted.forward == (forward,) * (cp_size - 1) + (0,)
        assert counted.backward == (0,) + (backward,) * (cp_size - 1)


def test_bytes_of_the_examples_of_the_specification() -> None:
    # LLaMA2-7B, 64k tokens on 8 ranks, chunks as long as shards: MB, one layer, forward.
    shape = Shape(batch=1, nheads=32, nheads_kv=32, head_dim=128, itemsize=2)
    layout = ContextLayout("contiguous", 65536, 8)
    assert METHOD.bytes(options(chunk_size=8192), shape, layout).forward[0] / 1e6 == pytest.approx(
        33.6, abs=0.05
    )
    # A quarter of its heads, so that flow has a chunk for each: worst rank and mean.
    by_rank = [
        sum(2 * 128 * 2 * received(Rule("chunk", 8192, 8192 * g), layout)[rank] for g in range(8))
        for rank in range(8)
    ]
    assert max(by_rank) * 4 / 1e6 == pytest.approx(117.4, abs=0.05)
    assert sum(by_rank) / 8 * 4 / 1e6 == pytest.approx(58.7, abs=0.05)
    flow = METHOD.bytes(
        options(pattern="flow", wrap="mask", chunk_size=8192),
        dataclasses.replace(shape, nheads=8, nheads_kv=8),
        layout,
    )
    assert sum(flow.forward) == sum(by_rank)
    # 16 dilated heads: the all-to-all, and the ring of one residue in four.
    dilated = dataclasses.replace(shape, nheads=16, nheads_kv=16)
    for pattern in ("sda", "sda_key"):
        counted = METHOD.bytes(options(pattern=pattern, dilation=4), dilated, layout)
        assert {round(sent / 1e6, 1) for sent in counted.forward} == {117.4}


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_the_dilated_patterns_in_closed_form(kind: str) -> None:
    shape = Shape(batch=2, nheads=16, nheads_kv=8, head_dim=32, itemsize=2)
    for cp_size in (2, 4, 8):
        layout, local = ContextLayout(kind, 64 * cp_size, cp_size), 64
        token = 2 * 32 * 2
        swapped = METHOD.bytes(options(pattern="sda", dilation=4), shape, layout)
        once = (2 * 16 + 2 * 8) * local * token * (cp_size - 1) // cp_size
        assert swapped.forward == swapped.backward == (once,) * cp_size
        ringed = METHOD.bytes(options(pattern="sda_key", dilation=4), shape, layout)
        lap = 2 * (local // 4) * 8 * token
        assert ringed.forward == ((cp_size - 1) * lap,) * cp_size
        assert ringed.backward == ((cp_size - 1) * lap + cp_size * 2 * lap,) * cp_size


# Options beyond those of the shared tests: shifts beyond a chunk, other chunks, s2, other shares.
OTHERS = [
    {"pattern": "fixed", "chunk_size": 5, "shift": 13},
    {"pattern": "fixed", "chunk_size": 7, "shift": 14, "wrap": "fold"},
    {"pattern": "fixed", "chunk_size": 1000, "shift": 20},
    {"pattern": "fixed", "chunk_size": 1},
    {"pattern": "flow", "chunk_size": 3, "stagger": 4},
    {"pattern": "flow", "chunk_size": 1000},
    {"pattern": "s2", "chunk_size": 6},
    {"pattern": "sda", "dilation": 1},
    {"pattern": "sda", "dilation": 7},
    {"pattern": "sda_key", "dilation": 7, "stagger": 3},
    {"pattern": "longmixed", "chunk_size": 6, "shift": 12, "wrap": "fold"},
    {"pattern": "longmixed", "chunk_size": 6, "fractions": (0.0, 0.6, 0.4)},
]


@pytest.mark.parametrize("words", OTHERS, ids=lambda words: "-".join(map(str, words.values())))
@pytest.mark.parametrize(
    ("kind", "cp_size"),
    [
        ("zigzag", 2),
        ("contiguous", 3),
        ("zigzag", 8),
        *(
            pytest.param(kind, cp_size, marks=pytest.mark.exhaustive)
            for kind, cp_size in (
                ("contiguous", 1),
                ("contiguous", 2),
                ("contiguous", 8),
                ("zigzag", 3),
            )
        ),
    ],
)
def test_other_options_on_virtual_ranks_equal_reference(
    kind: str, cp_size: int, words: dict[str, Any]
) -> None:
    packed = cp_size != 2
    problem = problem_of(words, kind, cp_size, packed=packed)
    truth = whole(problem)
    for impl in IMPLS:
        actual, sent = on_virtual_ranks(problem, impl)
        assert_all_match(actual, truth)
        if impl == "torch" and not packed:
            shape = Shape(2, 4, 2, 16, 8)
            assert sent == METHOD.bytes(problem.options, shape, problem.layout)


@pytest.mark.parametrize("chunk_size", [4, 12, 24, 36])
@pytest.mark.parametrize(
    "kind", [pytest.param("contiguous", marks=pytest.mark.exhaustive), "zigzag"]
)
def test_chunks_smaller_equal_and_larger_than_a_shard(kind: str, chunk_size: int) -> None:
    for pattern in ("fixed", "flow"):
        words = {"pattern": pattern, "chunk_size": chunk_size}
        for packed in (False, True):
            problem = problem_of(words, kind, 4, at_least=48, packed=packed)
            assert problem.layout.local_seqlen == 12
            truth = whole(problem)
            for impl in IMPLS:
                assert_all_match(on_virtual_ranks(problem, impl)[0], truth)


@pytest.mark.parametrize("kind", KINDS)
def test_flow_under_mask_equals_reference(kind: str) -> None:
    for cp_size in (1, 3, 8):
        words = {"pattern": "flow", "wrap": "mask", "chunk_size": 6}
        problem = problem_of(words, kind, cp_size, at_least=80)
        length = problem.layout.seqlen
        # Two documents of enough chunks for four units, an empty one, and padding of less.
        packed = torch.tensor([0, 31, 31, length - 7], dtype=torch.int32)
        for cu_seqlens in (None, packed):
            asked = dataclasses.replace(problem, cu_seqlens=cu_seqlens)
            truth = whole(asked)
            for impl in IMPLS:
                assert_all_match(on_virtual_ranks(asked, impl)[0], truth)


@pytest.mark.parametrize(("heads", "dilation"), [((8, 1), 2), ((12, 3), 3), ((6, 6), 1)])
def test_units_that_do_not_fill_the_ranks(heads: tuple[int, int], dilation: int) -> None:
    for words in (
        {"pattern": "sda", "dilation": dilation},
        {"pattern": "longmixed", "chunk_size": 7},
    ):
        for cp_size in (5, 8):
            problem = problem_of(words, "zigzag", cp_size, heads=heads, packed=True)
            truth = whole(problem)
            for impl in IMPLS:
                assert_all_match(on_virtual_ranks(problem, impl)[0], truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes_where_keys_are_sent_twice(dtype: torch.dtype) -> None:
    problem = problem_of({"pattern": "sda"}, "contiguous", 8, heads=(8, 1), dtype=dtype)
    sent = on_virtual_ranks(problem, "torch")[1]
    shape = Shape(2, 8, 1, 16, dtype.itemsize)
    assert sent == METHOD.bytes(problem.options, shape, problem.layout)
    # 48 tokens, 3 slots of each residue a rank, 8 units of 2 query heads, a key and a value.
    lane = 2 * 16 * dtype.itemsize
    assert sent.forward == ((4 + 2) * 7 * 3 * lane,) * 8
    assert sent.backward == (2 * 7 * 3 * lane + 4 * 7 * 3 * 2 * 16 * 4,) * 8


def test_units_by_hand() -> None:
    layout = ContextLayout("contiguous", 20, 2)
    units = UnitLayout(DilatedHeads(0, 3, (1, 1, 2, 2)), 2, layout)
    assert (units.bundle_size, units.num_bundles, units.units_per_rank) == (2, 2, [3, 3])
    assert not units.duplicates_keys
    # Keys of residue 0: queries of the first bundle at residue 1, of the second at 2.
    assert units.column_residues[:2].tolist() == [[1, 1, 0, 0], [2, 2, 0, 0]]
    assert units.column_heads[:2].tolist() == [[0, 1, 4, 6], [2, 3, 5, 7]]
    assert [units.num_rows(rank) for rank in (0, 1)] == [4, 4]
    # Rank 1 holds tokens 10 to 19: local tokens 2, 5 and 8 have residue 0.
    assert units.residue_tokens(1)[0].tolist() == [2, 5, 8, -1]
    assert units.global_order()[2].tolist() == [0, 1, 2, 4, 5, 6, -1]
    # As many units as ranks if heads can be separated, at the price of keys sent twice.
    many = UnitLayout(DilatedHeads(0, 3, (1, 1, 2, 2)), 2, ContextLayout("contiguous", 20, 10))
    assert (many.bundle_size, many.duplicates_keys) == (1, True)
    assert many.units_per_rank == [2, 2] + [1] * 8
    # Key heads 0, 1, 1, 1, 2: bundles of one query head, because two do not divide evenly.
    odd = UnitLayout(DilatedHeads(2, 4, (0, 1, 2, 3, 0)), 3, layout)
    assert odd.bundle_size == 1 and odd.bundle_kv_heads == [0, 1, 1, 1, 2]


def events_of(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the posts, waits and computations of one rank of two, in order."""
    events: dict[int, list[str]] = {0: [], 1: []}
    rank_of_thread = {}

    def spy(module: Any, name: str, event: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any, **more: Any) -> Any:
            events[rank_of_thread[threading.get_ident()]].append(event)
            return plain(*args, **more)

        monkeypatch.setattr(module, name, call)

    spy(scca_shift, "shift", "shift")
    spy(scca_swap, "swap", "swap")
    spy(Pending, "wait", "wait")
    for module in (scca_shift, scca_swap, scca_ring):
        spy(module, "banded_fwd", "compute")

    def run(rank: Any) -> None:
        rank_of_thread[threading.get_ident()] = rank.rank()
        qkv = [problem.layout.shard(x, rank.rank(), 1) for x in problem.qkv]
        METHOD.attention(
            *qkv, layout=problem.layout, group=rank, impl="torch", **problem.keywords()
        )

    VirtualGroup(2).run(run)
    assert events[0] == events[1]
    return events[1]


def test_shifts_are_posted_before_the_first_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fixed = problem_of({"pattern": "fixed", "chunk_size": 7}, "zigzag", 2)
    group = ["wait", "wait", "compute"]
    # Local heads and shifted heads, keys and values each.
    assert events_of(fixed, monkeypatch) == ["shift"] * 4 + ["compute"] + 2 * group


def test_longmixed_posts_the_swaps_first(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = problem_of({"pattern": "longmixed", "chunk_size": 7}, "zigzag", 2, heads=(4, 4))
    expected = ["swap", "swap", *["shift"] * 4, "compute", *["wait", "wait", "compute"] * 2]
    # The first units' outputs travel while the second's are computed.
    expected += 2 * ["wait", "compute", "swap"] + 2 * ["wait"]
    assert events_of(mixed, monkeypatch) == expected


def test_evaluation_sends_as_much_as_training_sends_forward() -> None:
    for words in ({"chunk_size": 7}, {"pattern": "longmixed", "chunk_size": 7}):
        problem = problem_of(words, "zigzag", 3)

        def forward(rank: Any, problem: Problem = problem) -> int:
            qkv = [problem.layout.shard(x, group_rank(rank), 1) for x in problem.qkv]
            with torch.no_grad(), traffic() as sent:
                METHOD.attention(*qkv, layout=problem.layout, group=rank, **problem.keywords())
            return sent.total

        assert tuple(VirtualGroup(3).run(forward)) == on_virtual_ranks(problem, "torch")[1].forward


def test_only_received_keys_are_saved_besides_own_tensors() -> None:
    problem = problem_of({"chunk_size": 8}, "contiguous", 2, at_least=64, heads=(4, 4))
    kept: dict[int, int] = {}

    def run(rank: Any) -> None:
        qkv = [problem.layout.shard(x, rank.rank(), 1).requires_grad_() for x in problem.qkv]
        asked = problem.keywords() | {"rotary": None}
        with saved_bytes() as saved:
            METHOD.attention(*qkv, layout=problem.layout, group=rank, impl="torch", **asked)
        kept[rank.rank()] = sum(saved.values())

    VirtualGroup(2).run(run)
    shard = 2 * 32 * 4 * 16
    own = 8 * (4 * shard + shard // 16)
    # Two of four heads get half a chunk of keys and of values.
    assert kept == {0: own, 1: own + 8 * 2 * (2 * 4 * 2 * 16)}


def test_bfloat16_gives_bfloat16() -> None:
    dtype = torch.bfloat16
    for pattern in ("fixed", "sda", "sda_key", "longmixed"):
        words = {"pattern": pattern} | ({} if pattern.startswith("sda") else {"chunk_size": 7})
        problem = problem_of(words, "zigzag", 2, dtype=dtype)
        for impl in IMPLS:
            assert all(x.dtype == dtype for x in on_virtual_ranks(problem, impl)[0])


def test_heads_that_see_nothing_give_zero() -> None:
    problem = problem_of({"chunk_size": 8, "shift": 999}, "contiguous", 3, heads=(4, 4))
    for impl in IMPLS:
        out, dq, dk, dv = on_virtual_ranks(problem, impl)[0]
        assert not any(x[:, :, 2:].any() for x in (out, dq, dk, dv))
        assert all(x[:, :, :2].any() and torch.isfinite(x).all() for x in (out, dq, dk, dv))


def test_flops_are_the_fractions_of_the_specification() -> None:
    n = 256

    def fraction(nheads: int = 4, **words: Any) -> float:
        shape = Shape(batch=2, nheads=nheads, nheads_kv=nheads, head_dim=8, itemsize=2, seqlen=n)
        return METHOD.flops(options(**words), shape) / (4 * 2 * nheads * 8 * n * (n + 1) // 2)

    quarter = {"chunk_size": n // 4}
    for words, expected in [
        ({"pattern": "s2", **quarter}, 0.237),
        ({"pattern": "fixed", **quarter}, 0.314),
        ({"pattern": "flow", "wrap": "mask", **quarter}, 0.250),
        ({"pattern": "flow", **quarter}, 0.360),
        ({"pattern": "sda", "dilation": 2}, 0.50),
        ({"pattern": "sda", "dilation": 4}, 0.25),
        ({"pattern": "sda_key", "dilation": 4}, 0.25),
        # A quarter each of local, shifted, dilation 2 and dilation 4.
        ({"nheads": 16, "pattern": "longmixed", **quarter}, 0.345),
    ]:
        assert round(fraction(**words), 3) == expected, words


def test_flops_by_hand() -> None:
    # 5 tokens in chunks of two: 1 + 2 + 1 + 2 + 1 pairs; shifted by one: 1 + 1 + 2 + 2 + 2.
    shape = Shape(batch=3, nheads=8, nheads_kv=4, head_dim=16, itemsize=2, seqlen=5)
    assert METHOD.flops(options(chunk_size=2), shape) == 4 * 3 * 16 * 4 * (7 + 8)
    upper = dataclasses.replace(
        shape, nheads=4, nheads_kv=2, heads=HeadSlice(first=4, nheads=8, first_kv=2, nheads_kv=4)
    )
    assert METHOD.flops(options(chunk_size=2), upper) == 4 * 3 * 16 * 4 * 8
    assert METHOD.flops(options(chunk_size=7), shape) == 4 * 3 * 16 * 4 * (15 + 14)


def test_more_key_heads_than_heads_are_left_to_the_plan() -> None:
    rules = model_rules(options(pattern="fixed", chunk_size=4), 1, 4)
    assert rules == (Rule("chunk", 4),)

"""Shifted cross chunk attention: rules by the specification's numbers, tiles against the truth."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary, full_reference, scca_attention, scca_reference, tiles
from lcdist_kernels.common import document_starts
from lcdist_kernels.full import TORCH_IMPL, AttentionImpl
from lcdist_kernels.scca import (
    Rule,
    dense_mask,
    head_groups,
    op,
    self_parts,
    slices,
)
from tests.kernels.test_full import DOUBLE, HEADS, LENGTHS, borders, inputs, with_grads
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager, assert_matches

IMPLS = ("reference", "torch")
# One a head: chunks that divide nothing, shifts within and beyond a chunk, all kinds.
MIXED = (
    Rule("chunk", 7),
    Rule("chunk", 7, 3),
    Rule("pair", 3, 1),
    Rule("key", 4, 2),
    Rule("chunk", 5, 13),
    Rule("fold", 6, 18),
    Rule("split", 9, 4),
    Rule("pair", 4, 0),
)
# Two members of a key head share a rule, two do not.
REPEATED = tuple(MIXED[i] for i in (0, 0, 2, 2, 5, 1, 5, 3))


def mask_of(rule: Rule, seqlen: int) -> Tensor:
    index = torch.arange(seqlen)
    return rule.mask(index[:, None], index)


FOLDED = [288, 484, 456, 456, 428, 456, 400, 456]
MASKED = [288, 448, 384, 320, 256, 192, 128, 64]
TOTALS = [
    (Rule("chunk", 64), 64, 2080),
    (Rule("chunk", 8), 64, 288),
    (Rule("chunk", 8, 4), 64, 432),
    (Rule("chunk", 8, 8), 64, 448),
    (Rule("chunk", 8, 24), 64, 320),
    (Rule("chunk", 8, 4), 60, 400),
    (Rule("split", 8, 4), 64, 272),
    *((Rule("chunk", 8, 8 * m), 64, total) for m, total in enumerate(MASKED)),
    *((Rule("fold", 8, 8 * m), 64, total) for m, total in enumerate(FOLDED)),
    *(
        (Rule(kind, 2, s), 64, total)
        for kind in ("pair", "key")
        for s, total in [(0, 1056), (1, 1024)]
    ),
    *(
        (Rule(kind, 4, s), 64, total)
        for kind in ("pair", "key")
        for s, total in enumerate([544, 528, 512, 496])
    ),
]


@pytest.mark.parametrize(("rule", "seqlen", "total"), TOTALS)
def test_totals_of_the_specification(rule: Rule, seqlen: int, total: int) -> None:
    assert int(mask_of(rule, seqlen).sum()) == total == rule.pairs(seqlen)


@pytest.mark.parametrize(
    ("shift", "ranges"),
    [
        (0, [(0, 0), (0, 5), (16, 20), (56, 63)]),
        (4, [(0, 0), (0, 3), (12, 19), (52, 59)]),
        (8, [None, None, (8, 15), (48, 55)]),
        (24, [None, None, None, (32, 39)]),
    ],
)
def test_key_ranges_of_the_specification(shift: int, ranges: list[tuple[int, int] | None]) -> None:
    mask = mask_of(Rule("chunk", 8, shift), 64)
    for row, seen in zip((0, 5, 20, 63), ranges, strict=True):
        keys = mask[row].nonzero().flatten().tolist()
        assert keys == ([] if seen is None else list(range(seen[0], seen[1] + 1)))


@pytest.mark.parametrize("seqlen", [1, 5, 60, 64])
@pytest.mark.parametrize("rule", dict.fromkeys([*MIXED, *(rule for rule, _, _ in TOTALS)]), ids=str)
def test_limits_are_those_of_the_mask(rule: Rule, seqlen: int) -> None:
    mask, j = mask_of(rule, seqlen), torch.arange(seqlen)
    first, last = rule.limits(j)
    between = (j >= first[:, None]) & (j <= last[:, None])
    if rule.is_window:
        assert torch.equal(mask, between)
    assert not (mask & ~between).any() and not mask.triu(1).any()


def test_who_looks_back_and_who_sees_nothing() -> None:
    def of(shift: int) -> tuple[int, int]:
        mask = mask_of(Rule("chunk", 8, shift), 64)
        return int((~mask.diagonal()).sum()), int((~mask.any(1)).sum())

    # Rows that do not see themselves, and rows that see nothing.
    assert [of(s) for s in (0, 4, 8, 12, 24)] == [(0, 0), (32, 0), (64, 8), (64, 8), (64, 24)]
    for m in range(8):
        assert mask_of(Rule("fold", 8, 8 * m), 64).any(1).all()
    empty = mask_of(Rule("pair", 4, 3), 64).any(1).logical_not().nonzero().flatten()
    assert empty.tolist() == [0, 1, 2]


def test_heads_together_see_all_that_is_causal() -> None:
    triangle = torch.ones(64, 64).tril()
    flow = sum(mask_of(Rule("chunk", 8, 8 * m), 64).float() for m in range(8))
    assert torch.equal(flow, triangle)
    for kind, r in itertools.product(("pair", "key"), (2, 3, 4)):
        assert torch.equal(sum(mask_of(Rule(kind, r, s), 64).float() for s in range(r)), triangle)
    folded = sum(mask_of(Rule("fold", 8, 8 * m), 64).float() for m in range(8))
    for seen, c in itertools.combinations_with_replacement(range(8), 2):
        times = folded[8 * c + 7, 8 * seen]
        assert times in (8 // (c + 1), -(-8 // (c + 1)))
    assert torch.equal(folded > 0, triangle > 0)


def test_a_key_has_one_chunk_of_readers_unless_folded() -> None:
    def readers(rule: Rule) -> int:
        chunks = mask_of(rule, 64).view(8, 8, 64).any(1)
        return int(chunks.sum(0).max())

    assert all(readers(Rule("chunk", 8, s)) == 1 for s in (0, 3, 4, 8, 13, 24))
    assert [readers(Rule("fold", 8, 8 * m)) for m in range(8)] == [1, 2, 2, 3, 3, 4, 3, 4]


def test_folded_is_masked_where_the_shift_fits() -> None:
    for m in range(8):
        fold, mask = mask_of(Rule("fold", 8, 8 * m), 64), mask_of(Rule("chunk", 8, 8 * m), 64)
        assert torch.equal(fold[8 * m :], mask[8 * m :])


def test_reference_by_hand() -> None:
    # exp(q . k_j) = 1, 2, 3, 4: the weights are small fractions.
    q = torch.ones(1, 4, 2, 1, dtype=DOUBLE)
    k = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DOUBLE).log().view(1, 4, 1, 1)
    v = torch.tensor([6.0, 3.0, 1.0, 5.0], dtype=DOUBLE).view(1, 4, 1, 1)
    # Chunks of two, delayed by one: 0 | 0 | 1, 2 up to itself; every second distance from 1.
    rules = (Rule("chunk", 2, 1), Rule("pair", 2, 1))
    for impl in IMPLS:
        out = scca_attention(q, k, v, rules=rules, impl=impl)
        expected = torch.tensor([[6, 6, 9 / 5, 9 / 5], [0, 6, 3, 9 / 4]], dtype=DOUBLE)
        assert_matches(out[0, :, :, 0].T, expected)
        # A document of one token, then the padding of three: chunks and residues restart.
        packed = torch.tensor([0, 1], dtype=torch.int32)
        out = scca_attention(q, k, v, rules=rules, cu_seqlens=packed, impl=impl)
        expected = torch.tensor([[6, 3, 3, 23 / 7], [0, 0, 3, 1]], dtype=DOUBLE)
        assert_matches(out[0, :, :, 0].T, expected)


@pytest.mark.parametrize(
    ("seqlen", "packed", "heads"),
    covering(one(LENGTHS), one([False, True]), one(HEADS), free=2),
)
def test_equals_reference(seqlen: int, heads: tuple[int, int], packed: bool) -> None:
    qkv = inputs(seqlen, heads)
    dout = torch.randn_like(qkv[0])
    more = {
        "rules": MIXED if heads[1] > 2 else REPEATED,
        "rotary": Rotary(frequencies(16), 1.1),
        "cu_seqlens": borders(seqlen) if packed else None,
    }
    truth = with_grads(scca_reference(*qkv, **more), qkv, dout)
    got = with_grads(scca_attention(*qkv, **more, impl="torch"), qkv, dout)
    for actual, reference in zip(got, truth, strict=True):
        # A lone key has no gradient but rounding.
        if reference.norm() > 1e-12 or seqlen > 1:
            assert_matches(actual, reference)
        else:
            assert actual.norm() < 1e-12


def test_small_tiles_and_a_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 16)
    monkeypatch.setattr(tiles, "SHORT_ROW", 0)
    monkeypatch.setattr(tiles, "SCORES_AT_ONCE", 3 * 16 * 16)
    for rules in (MIXED, REPEATED, [Rule("chunk", 50, 25)] * 8, [Rule("fold", 3, 9)] * 8):
        for cu_seqlens in (None, borders(203)):
            qkv = inputs(203, (8, 4))
            dout = torch.randn_like(qkv[0])
            more = {"rules": rules, "cu_seqlens": cu_seqlens}
            truth = with_grads(scca_reference(*qkv, **more), qkv, dout)
            got = with_grads(scca_attention(*qkv, **more, impl="torch"), qkv, dout)
            for actual, reference in zip(got, truth, strict=True):
                assert_matches(actual, reference)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
def test_reached_tokens_are_those_of_the_mask(packed: bool, impl: str) -> None:
    # Values are unit vectors: out is the matrix of weights.
    seqlen = 40
    q, k = (torch.randn(1, seqlen, 8, seqlen, dtype=DOUBLE) for _ in range(2))
    v = torch.eye(seqlen, dtype=DOUBLE).view(1, seqlen, 1, seqlen).expand_as(k)
    cu_seqlens = torch.tensor([0, 1, 1, 18, 33], dtype=torch.int32) if packed else None
    out = scca_attention(q, k, v, rules=MIXED, cu_seqlens=cu_seqlens, impl=impl)
    index = torch.arange(seqlen)
    starts = document_starts(cu_seqlens, index, seqlen)
    for head, rule in enumerate(MIXED):
        for i in range(seqlen):
            start = int(starts[i])
            place = torch.tensor([i - start])
            seen = [j for j in range(start, i + 1) if rule.mask(place, torch.tensor([j - start]))]
            assert out[0, i, head].nonzero().flatten().tolist() == seen
    assert torch.equal(dense_mask(MIXED, index, starts, index, starts), out[0].transpose(0, 1) > 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "whole", [Rule("chunk", 300), Rule("fold", 100), Rule("pair", 1), Rule("key", 1)]
)
def test_a_rule_that_shows_all_is_full_attention(whole: Rule, impl: str) -> None:
    qkv = inputs(100)
    dout = torch.randn_like(qkv[0])
    truth = with_grads(full_reference(*qkv), qkv, dout)
    got = with_grads(scca_attention(*qkv, rules=[whole] * 4, impl=impl), qkv, dout)
    for actual, reference in zip(got, truth, strict=True):
        assert_matches(actual, reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_see_nothing_are_zero_and_do_no_harm(impl: str, dtype: torch.dtype) -> None:
    assert_rows_without_keys_are_zero(lambda n: inputs(n, (4, 4), dtype=dtype), impl)


def assert_rows_without_keys_are_zero(make: Callable[[int], list[Tensor]], impl: str) -> None:
    """Assert that rows that see nothing are zero and give no gradients; make: seqlen to q, k, v."""
    rules = (Rule("chunk", 8, 16), Rule("chunk", 8, 999), Rule("pair", 4, 3), Rule("key", 4, 3))
    for seqlen in (1, 3, 40):
        qkv = make(seqlen)
        out = scca_attention(*qkv, rules=rules, impl=impl)
        grads = torch.autograd.grad(out, qkv, torch.randn_like(out))
        assert all(torch.isfinite(x).all() for x in (out, *grads))
        assert not out[:, :16, 0].any() and not out[:, :, 1].any() and not out[:, :3, 2:].any()
        assert not grads[0][:, :16, 0].any() and not grads[2][:, :, 1].any()
        if seqlen == 40:
            assert out[:, 16:, 0].abs().min() > 0 and out[:, 3:, 2:].abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_as_good_as_eager_in_low_precision(dtype: torch.dtype) -> None:
    rules = (Rule("chunk", 50, 25), Rule("fold", 40, 80), Rule("pair", 2, 0), Rule("key", 2, 0))
    qkv = inputs(257, dtype=dtype)
    dout = torch.randn_like(qkv[0])
    wide = [x.detach().double().requires_grad_() for x in qkv]
    truth = with_grads(scca_reference(*wide, rules=rules), wide, dout.double())
    index, starts = torch.arange(257), torch.zeros(257, dtype=torch.int64)
    mask = dense_mask(rules, index, starts, index, starts)
    k, v = (x.repeat_interleave(2, 2) for x in qkv[1:])
    scores = torch.einsum("bshd,bthd->bhst", qkv[0], k) * 16**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    eager = with_grads(torch.einsum("bhst,bthd->bshd", weights, v), qkv, dout)
    got = with_grads(scca_attention(*qkv, rules=rules, impl="torch"), qkv, dout)
    for actual, plain, reference in zip(got, eager, truth, strict=True):
        assert actual.dtype == dtype
        assert_as_good_as_eager(actual, plain, reference)


def area(rules: list[Rule], seqlen: int) -> int:
    parts = self_parts(head_groups(rules, len(rules)), torch.zeros(seqlen, dtype=torch.int64))
    heads = [len(range(len(rules))[part.kv]) for part in parts]
    sides = [len(part.q_hi) * len(part.k_idx) for part in parts]
    return sum(h * side for h, side in zip(heads, sides, strict=True))


def test_only_what_is_touched_is_handed_to_tiles() -> None:
    n = 2048
    for w in (256, 512):
        for s in (0, w // 2, w, 2 * w):
            # Every chunk of queries over just its window; chunk 0's may be shorter or none.
            keys = [min(c * w - s + w, n) - max(c * w - s, 0) for c in range(n // w)]
            assert area([Rule("chunk", w, s)] * 2, n) == 2 * sum(w * max(0, x) for x in keys)
        assert area([Rule("fold", w, 3 * w)], n) == n * w
    # Small chunks share a tile, with at most a tile's width of keys more.
    assert area([Rule("chunk", 64, 32)], n) <= n * (tiles.BLOCK + 64)
    assert area([Rule("fold", 16, 48)], n) <= 2 * n * tiles.BLOCK
    for r in (2, 4):
        assert area([Rule("pair", r, 1)], n) == area([Rule("key", r, 1)], n) == n * n // r


def test_no_key_is_copied_on_the_way_to_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(96, (8, 8))
    homes = {k.data_ptr(): k, v.data_ptr(): v}
    seen = []

    def spy(name: str, plain):  # noqa: ANN001, ANN202
        def call(*args):  # noqa: ANN002, ANN202
            seen.append(name)
            for x in args[1:3] if name == "full_fwd" else args[2:4]:
                assert x.untyped_storage().data_ptr() in homes
            return plain(*args)

        return call

    spied = AttentionImpl(spy("full_fwd", TORCH_IMPL.fwd), spy("full_bwd", TORCH_IMPL.bwd))
    monkeypatch.setattr(op, "select_impl", lambda *asked: spied)
    scca_attention(q, k, v, rules=MIXED, impl="torch").sum().backward()
    assert set(seen) == {"full_fwd", "full_bwd"}


def test_saves_inputs_out_and_lse_alone() -> None:
    q, k, v = inputs(512, (8, 2), dtype=torch.float32)
    with saved_bytes() as saved:
        scca_attention(q, k, v, rules=REPEATED, impl="torch")
    elements = 2 * q.numel() + 2 * k.numel() + 2 * 512 * 8
    assert sum(saved.values()) == 4 * elements


@pytest.mark.parametrize("impl", IMPLS)
def test_given_positions_are_those_rotated_by(impl: str) -> None:
    q, k, v = inputs(20, (8, 4))
    rotary, positions = Rotary(frequencies(16)), torch.randint(0, 500, (2, 20))
    rotated = (rotary.rotate(q, positions), rotary.rotate(k, positions), v)
    truth = scca_reference(*rotated, rules=MIXED)
    more = {"rotary": rotary, "positions": positions, "impl": impl}
    assert_matches(scca_attention(q, k, v, rules=MIXED, **more), truth)


def test_heads_in_groups_cover_each_once() -> None:
    for rules, nheads_kv in ((MIXED, 8), (MIXED, 2), (REPEATED, 4), (REPEATED, 1), (MIXED, 1)):
        size, found = len(rules) // nheads_kv, {}
        for group in head_groups(rules, nheads_kv):
            for kv in range(nheads_kv)[group.kv]:
                for members, rule in group.members:
                    for member in range(size)[members]:
                        assert kv * size + member not in found
                        found[kv * size + member] = rule
        assert [found[head] for head in range(len(rules))] == list(rules)
    assert slices([0, 1, 2, 3]) == [slice(0, 4, 1)] and slices([1, 4, 7]) == [slice(1, 8, 3)]
    assert slices([0, 1, 5]) == [slice(0, 2, 1), slice(5, 6, 1)] and slices([]) == []
    assert math.prod(len(range(9)[s]) for s in slices([2, 5, 8])) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rules": [Rule("chunk", 4)] * 3}, "3 rules for 4 query heads"),
        ({"rules": [Rule("sideways", 4)] * 4}, "kind must be one of"),
        ({"rules": [Rule("chunk", 0)] * 4}, "size >= 1"),
        ({"rules": [Rule("chunk", 4, -1)] * 4}, "shift >= 0"),
        ({"rules": [Rule("fold", 4, 6)] * 4}, "multiple of size"),
        ({"rules": [Rule("pair", 4, 4)] * 4}, "below size"),
        ({"impl": "cuda"}, "is unknown: .* auto, triton, torch, reference"),
        ({"q": torch.ones(2, 7, 4, 16)}, "q has 7 tokens"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, r"\[0, 9\].*seqlen = 8"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, says: str) -> None:
    call = {name: torch.ones(2, 8, n, 16) for name, n in zip("qkv", (4, 2, 2), strict=True)}
    call |= {"rules": [Rule("chunk", 4)] * 4}
    for impl in IMPLS:
        with pytest.raises(ValueError, match=says):
            scca_attention(**(call | {"impl": impl} | change))

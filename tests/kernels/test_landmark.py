"""Landmark attention's operators: by hand, as published, limits, who sees what, the choice."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary, full_reference, landmark_attention, landmark_reference, tiles
from lcdist_kernels.landmark import (
    BlockLists,
    QueryRows,
    block_grid,
    block_starts,
    choose_blocks,
    landmark_bwd,
    landmark_fwd,
    landmark_partial,
    sparse_bwd,
    sparse_fwd,
    unit_lengths,
)
from lcdist_kernels.landmark import sparse as sparse_module
from lcdist_kernels.landmark import tiled as tiled_module
from lcdist_kernels.landmark import top_k as choose_module
from lcdist_kernels.partial import merge
from tests.kernels.helpers import rotated_and_packed
from tests.kernels.test_full import DOUBLE, HEADS, WRONG_INPUTS, borders, inputs, with_grads
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one, tiered
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager, assert_matches

LENGTHS = [1, 63, 100, 257]
IMPLS = ["reference", "torch"]
# Dense, token by token, and units that no block divides.
CHOICES: list[dict[str, Any]] = [
    {},
    {"top_k": 2, "select_tokens": 1},
    {"top_k": 3, "select_tokens": 31},
]


def by_both(qkv: list[Tensor], dout: Tensor, **asked: Any) -> list[list[Tensor]]:
    """[out, dq, dk, dv] of the reference and of the tiled operator."""
    return [with_grads(landmark_attention(*qkv, impl=i, **asked), qkv, dout) for i in IMPLS]


def assert_all(actual: list[Tensor], reference: list[Tensor]) -> None:
    for a, r in zip(actual, reference, strict=True):
        assert_matches(a, r)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE).view(1, -1, 1, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl: str) -> None:
    # exp(q . k_j) = 1, 2, ..., 7 in blocks of 3; the values of landmarks must not matter.
    k, v = column([1, 2, 3, 4, 5, 6, 7]).log(), column([6, 3, 99, 11, 2, 99, 5])
    call = {"q": torch.ones_like(k), "k": k, "v": v, "block_size": 3, "impl": impl}
    # Inside block 0: (6 + 2 3) / 3 = 4, gate 3; inside block 1: (4 11 + 5 2) / 9 = 6, gate 6.
    last = (7 * 5 + 3 * 4 + 6 * 6) / 16
    expected = [6, 4, 4, (4 * 11 + 3 * 4) / 7, 66 / 12, 66 / 12, last]
    assert_matches(landmark_attention(**call).flatten(), column(expected).flatten())
    # Token 6 has landmarks of 3 and of 6 behind it.
    expected[6] = (7 * 5 + 6 * 6) / 13
    chosen = landmark_attention(**call, top_k=1)
    assert_matches(chosen.flatten(), column(expected).flatten())
    # Two documents: the second's landmark is token 6, and 99 is content there.
    cut = torch.tensor([0, 4], dtype=torch.int32)
    expected[4:] = [2, (5 * 2 + 6 * 99) / 11, (5 * 2 + 6 * 99) / 11]
    packed = landmark_attention(**call, cu_seqlens=cut)
    assert_matches(packed.flatten(), column(expected).flatten())


def published(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> Tensor:
    """Compute a softmax by groups: past content by block; landmarks and local keys in the last."""
    index = torch.arange(q.shape[1])
    block, landmark = index // block_size, index % block_size == block_size - 1
    same = block[:, None] == block
    group = torch.where(same | landmark, index.max() + 1, block).expand(same.shape)
    seen = (index <= index[:, None]) & ~(same & landmark)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[3] ** -0.5
    weights = scores.exp() * seen
    totals = torch.zeros(*weights.shape[:3], int(group.max()) + 1, dtype=DOUBLE)
    totals = totals.scatter_add(3, group.expand(weights.shape), weights)
    weights = weights / totals.gather(3, group.expand(weights.shape)).clamp_min(1e-300)
    gates = weights[..., landmark]
    pad = torch.ones_like(weights[..., : int(block.max()) + 1 - gates.shape[3]])
    own_gate = torch.where(same, 1.0, torch.cat((gates, pad), -1)[..., block])
    return torch.einsum("bhst,bthd->bshd", weights * own_gate * ~landmark, v)


@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_equals_the_published_form(block_size: int) -> None:
    qkv = inputs(43)
    dout = torch.randn_like(qkv[0])
    truth = with_grads(published(*qkv, block_size), qkv, dout)
    for got in by_both(qkv, dout, block_size=block_size):
        assert_all(got, truth)


@pytest.mark.parametrize(
    ("seqlen", "choice", "heads", "block_size", "packed"),
    covering(
        one(LENGTHS),
        one(CHOICES),
        list(zip(HEADS, (2, 7, 64, 300), strict=True)),
        one([False, True]),
        free=2,
    ),
)
def test_equals_reference(
    seqlen: int, heads: tuple[int, int], block_size: int, packed: bool, choice: dict[str, Any]
) -> None:
    qkv = inputs(seqlen, heads)
    more = {"block_size": block_size, **rotated_and_packed(seqlen, 16, packed)}
    truth, got = by_both(qkv, torch.randn_like(qkv[0]), **more, **choice)
    assert_all(got, truth)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("block_size", tiered(one([3, 33, 20, 90]), {0, 1}))
def test_blocks_smaller_and_larger_than_a_tile(
    block_size: int, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (tiles, sparse_module):
        monkeypatch.setattr(module, "BLOCK", 32)
    monkeypatch.setattr(tiles, "SHORT_ROW", 0)
    for module in (tiles, tiled_module, sparse_module):
        monkeypatch.setattr(module, "SCORES_AT_ONCE", 3 * 32 * 32)
    monkeypatch.setattr(sparse_module, "KEYS_AT_ONCE", 5 * 32 * 16)
    monkeypatch.setattr(choose_module, "SCORES_AT_ONCE", 2 * 6 * 90 * 4)
    qkv = inputs(203, (6, 3))
    dout = torch.randn_like(qkv[0])
    for cu_seqlens in (None, borders(203)):
        more = {"block_size": block_size, "cu_seqlens": cu_seqlens, **choice}
        truth, got = by_both(qkv, dout, **more)
        assert_all(got, truth)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_given_positions_are_those_rotated_by(impl: str) -> None:
    q, k, v = inputs(20)
    rotary, positions = Rotary(frequencies(16)), torch.randint(0, 500, (2, 20))
    turned = rotary.rotate(q, positions), rotary.rotate(k, positions)
    truth = landmark_reference(*turned, v, block_size=4)
    call = {"rotary": rotary, "positions": positions, "impl": impl, "block_size": 4}
    assert_matches(landmark_attention(q, k, v, **call), truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_block_is_causal_attention_without_the_landmark(impl: str) -> None:
    qkv = inputs(40)
    dout = torch.randn_like(qkv[0])
    truth = with_grads(full_reference(*qkv), qkv, dout)
    assert_all(with_grads(landmark_attention(*qkv, block_size=41, impl=impl), qkv, dout), truth)
    out = landmark_attention(*qkv, block_size=40, impl=impl)
    assert_matches(out[:, :39], truth[0][:, :39])
    q, k, v = qkv
    last = [torch.cat((q[:, :38], q[:, 39:]), 1), k[:, :39], v[:, :39]]
    assert_matches(out[:, 39], full_reference(*last)[:, 38])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("select_tokens", [1, 9, 1000])
def test_as_many_as_there_are_blocks_is_dense(select_tokens: int, impl: str) -> None:
    qkv = inputs(60)
    dout = torch.randn_like(qkv[0])
    dense = with_grads(landmark_reference(*qkv, block_size=4), qkv, dout)
    for top_k in (14, 15, 99):
        call = {"block_size": 4, "top_k": top_k, "select_tokens": select_tokens, "impl": impl}
        assert_all(with_grads(landmark_attention(*qkv, **call), qkv, dout), dense)
    few = landmark_attention(*qkv, **(call | {"top_k": 12}))
    assert not torch.allclose(few, dense[0])


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_weights_add_up_to_one_and_a_shift_of_all_scores_is_lost(
    impl: str, choice: dict[str, Any]
) -> None:
    q, k, v = inputs(50)
    call = {"block_size": 6, "impl": impl, **choice}
    ones = landmark_attention(q, k, torch.ones_like(v), **call)
    assert_matches(ones, torch.ones_like(q))
    shifted = landmark_attention(q, k + 3 * torch.randn(1, 1, 1, 16, dtype=DOUBLE), v, **call)
    assert_matches(shifted, landmark_attention(q, k, v, **call))


@pytest.mark.parametrize("choice", CHOICES)
def test_extreme_scores_do_no_harm(choice: dict[str, Any]) -> None:
    qkv = inputs(70, dtype=torch.float32)
    with torch.no_grad():
        qkv[0].sign_()
        qkv[1].sign_()
    # Scores are multiples of 10 from -80 on to 80, in blocks and at landmarks.
    wide = [x.detach().double().requires_grad_() for x in qkv]
    dout = torch.randn_like(qkv[0])
    more = {"block_size": 5, "softmax_scale": 5.0, **choice}
    truth = with_grads(landmark_reference(*wide, **more), wide, dout.double())
    assert all(torch.isfinite(x).all() for x in truth)
    for got in by_both(qkv, dout, **more):
        for actual, reference in zip(got, truth, strict=True):
            assert_matches(actual, reference, 1e-5)


def seen_by(impl: str, cu_seqlens: Tensor | None, **asked: Any) -> tuple[Tensor, Tensor]:
    """Return whether query i's output depends on k_j, and on v_j: bool [s, s] each."""
    q, k, v = inputs(30, (1, 1))
    out = landmark_attention(q, k, v, cu_seqlens=cu_seqlens, impl=impl, **asked)
    rows = [torch.autograd.grad(row.sum(), (k, v), retain_graph=True) for row in out.unbind(1)]
    return tuple(
        torch.stack([(x.abs() > 1e-14).any(3).any(2).any(0) for x in one])
        for one in zip(*rows, strict=True)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("begins", [[0], [0, 4, 13], [0, 8, 16, 17]])
@pytest.mark.parametrize("top_k", [None, 99])
def test_a_query_depends_on_the_past_but_for_its_blocks_landmark(
    top_k: int | None, begins: list[int], impl: str
) -> None:
    keys, values = torch.zeros(30, 30).bool(), torch.zeros(30, 30).bool()
    for start, stop in itertools.pairwise([*begins, 30]):
        for i, j in itertools.product(range(start, stop), repeat=2):
            landmark = (j - start) % 4 == 3
            mine = (i - start) // 4 == (j - start) // 4
            # The first of a document has no choice, so that no score has an effect.
            keys[i, j] = start < i and j <= i and not (mine and landmark)
            values[i, j] = j <= i and not landmark
    got = seen_by(impl, torch.tensor(begins, dtype=torch.int32), block_size=4, top_k=top_k)
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)


def chosen_by_hand(q: Tensor, k: Tensor, scale: float, size: int, top_k: int, unit: int):
    """{(batch, key head, unit): blocks}: the choice, line by line as it is written down."""
    group, found = q.shape[2] // k.shape[2], {}
    for b, head, first in itertools.product(
        range(q.shape[0]), range(k.shape[2]), range(0, q.shape[1], unit)
    ):
        best: dict[int, float] = {}
        for i in range(first, min(first + unit, q.shape[1])):
            past = range(i // size)
            if not past:
                continue
            marks = torch.stack([k[b, n * size + size - 1, head] for n in past])
            for h in range(head * group, (head + 1) * group):
                for n, p in zip(
                    past, (scale * marks @ q[b, i, h]).softmax(0).tolist(), strict=True
                ):
                    best[n] = max(best.get(n, 0.0), p)
        found[b, head, first // unit] = sorted(sorted(best, key=lambda n: -best[n])[:top_k])
    return found


@pytest.mark.parametrize("unit", [1, 5, 16, 100])
def test_the_choice_by_hand(unit: int) -> None:
    q, k, _ = (x.detach() for x in inputs(45, (4, 2)))
    rows, index = block_grid(None, 45, 4).rows, torch.arange(45)
    lengths = unit_lengths(index, torch.zeros_like(index), unit)
    got = choose_blocks(q, k[:, 3::4], rows, lengths, 3, 0.7)
    for (b, head, number), blocks in chosen_by_hand(q, k, 0.7, 4, 3, unit).items():
        expected = blocks + [-1] * (3 - len(blocks))
        assert got[b, head, number].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, DOUBLE])
def test_equal_landmarks_are_chosen_from_the_first_on(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Blocks n and n + 7 are twins; a sum in another order must not tell them apart.
    q = torch.randn(1, 4 * 70, 6, 64).to(dtype)
    k = torch.randn(1, 7, 2, 64).to(dtype).repeat(1, 10, 1, 1)
    rows = block_grid(None, 280, 4).rows
    for unit in (1, 4, 280):
        lengths = torch.full((280 // unit,), unit)
        whole = choose_blocks(q, k, rows, lengths, 9, 0.3)
        counts = (whole[..., None] == torch.arange(70)).sum((0, 1, 2, 3)).view(10, 7)
        assert (counts.diff(dim=0) <= 0).all() and counts[0].sum() > counts[-1].sum()
        with monkeypatch.context() as patch:
            patch.setattr(choose_module, "SCORES_AT_ONCE", 6 * 70 * 3)
            assert torch.equal(choose_blocks(q, k, rows, lengths, 9, 0.3), whole)
        for head in (0, 1):
            part = q[:, :, 3 * head : 3 * head + 3], k[:, :, head : head + 1]
            alone = choose_blocks(*part, rows, lengths, 9, 0.3)
            assert torch.equal(alone, whole[:, head : head + 1])


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_chosen_is_not_read(impl: str) -> None:
    q, k, v = inputs(30, (1, 1))
    chosen = chosen_by_hand(q[:1], k[:1], 0.25, 4, 2, 10)
    qkv = [x[:1] for x in (q, k, v)]
    out = landmark_attention(*qkv, block_size=4, top_k=2, select_tokens=10, impl=impl)
    for i in range(30):
        (dv,) = torch.autograd.grad(out[:, i].sum(), v, retain_graph=True)
        read = {j // 4 for j in (dv[0] != 0).any(2).any(1).nonzero().flatten().tolist()}
        assert read == {n for n in chosen[0, 0, i // 10] if n < i // 4} | ({i // 4})


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_of_landmarks_get_no_gradient_at_all(impl: str, choice: dict[str, Any]) -> None:
    qkv = inputs(75, dtype=torch.float32)
    call = {"block_size": 6, "impl": impl, **choice}
    dv = with_grads(landmark_attention(*qkv, **call), qkv, torch.randn_like(qkv[0]))[3]
    assert torch.all(dv[:, 5::6] == 0) and torch.all(dv[:, 4::6] != 0)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_documents_are_sequences_of_their_own(impl: str, choice: dict[str, Any]) -> None:
    # With units of 31 tokens the documents must begin at multiples of 31.
    cuts = [(0, 31), (31, 62), (62, 124), (124, 140)]
    if "top_k" not in choice or choice["select_tokens"] == 1:
        cuts = [(0, 2), (2, 25), (25, 26), (26, 140)]
    cu_seqlens = torch.tensor([start for start, _ in cuts], dtype=torch.int32)
    qkv = inputs(140)
    dout = torch.randn_like(qkv[0])
    call = {"block_size": 6, "rotary": Rotary(frequencies(16)), "impl": impl, **choice}
    alone = [landmark_attention(*(x[:, a:b] for x in qkv), **call) for a, b in cuts]
    truth = with_grads(torch.cat(alone, 1), qkv, dout)
    packed = landmark_attention(*qkv, cu_seqlens=cu_seqlens, **call)
    assert_all(with_grads(packed, qkv, dout), truth)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_border_inside_a_unit_leaks_nothing(impl: str) -> None:
    q, k, v = (x.detach() for x in inputs(60))
    call = {"block_size": 4, "top_k": 1, "select_tokens": 30, "impl": impl}
    call["cu_seqlens"] = torch.tensor([0, 17, 44], dtype=torch.int32)
    before = landmark_attention(q, k, v, **call)
    inside = torch.zeros(60, dtype=torch.bool)
    inside[17:44] = True
    qkv = [x.where(~inside[:, None, None], torch.randn_like(x)) for x in (q, k, v)]
    after = landmark_attention(*qkv, **call)
    assert torch.equal(after[:, ~inside], before[:, ~inside])
    assert not torch.equal(after[:, inside], before[:, inside])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unit", [1, 10])
def test_units_before_a_change_keep_their_bits(unit: int, impl: str) -> None:
    qkv = [x.detach() for x in inputs(60)]
    call = {"block_size": 4, "top_k": 2, "select_tokens": unit, "impl": impl}
    before, moved = landmark_attention(*qkv, **call), 0
    for t in range(1, 60, 3):
        for i in range(3):
            changed = [x.clone() for x in qkv]
            changed[i][:, t:] = 2 * torch.randn_like(changed[i][:, t:])
            out, whole = landmark_attention(*changed, **call), t // unit * unit
            assert torch.equal(out[:, :whole], before[:, :whole])
            assert not torch.equal(out[:, t:], before[:, t:])
            moved += not torch.equal(out[:, whole:t], before[:, whole:t])
    # The promise ends there: a later query of the unit has its say.
    assert (moved > 0) == (unit > 1)


@pytest.mark.parametrize("choice", [{}, {"top_k": 2}])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_tail_of_padding_changes_nothing(impl: str, choice: dict[str, Any]) -> None:
    q, k, v = (x.detach() for x in inputs(90))
    call = {"block_size": 8, "impl": impl, **choice}
    whole = landmark_attention(q, k, v, **call)
    for seqlen in (1, 37, 64, 65):
        part = landmark_attention(q[:, :seqlen], k[:, :seqlen], v[:, :seqlen], **call)
        assert_matches(part, whole[:, :seqlen])


@pytest.mark.parametrize("cut", ["runs", "mirrored", "single blocks"])
def test_pieces_of_whole_blocks_merge_to_the_whole(cut: str) -> None:
    size, pieces = 5, [torch.arange(50 * i, 50 * i + 50) for i in range(3)]
    if cut == "mirrored":
        sixths = torch.arange(150).chunk(6)
        pieces = [torch.cat((sixths[i], sixths[5 - i])) for i in range(3)]
    elif cut == "single blocks":
        pieces = list(torch.arange(150).split(size))
    cu_seqlens = torch.tensor([0, 35, 35, 75], dtype=torch.int32)
    rows = block_grid(cu_seqlens, 150, size).rows
    qkv = inputs(150)
    dout = torch.randn_like(qkv[0])
    truth = with_grads(landmark_reference(*qkv, block_size=size, cu_seqlens=cu_seqlens), qkv, dout)
    got = [torch.zeros_like(x) for x in truth]
    q, k, v = (x.detach() for x in qkv)
    for piece in pieces:
        mine = QueryRows(piece, rows.lo[piece], size)
        parts = []
        for other in pieces:
            block = (q[:, piece], k[:, other], v[:, other], mine, other[::size], 0.25)
            part, dense = landmark_fwd(*block), landmark_partial(*block)
            torch.testing.assert_close(part, dense, rtol=1e-10, atol=1e-12)
            parts.append(part)
        out, lse = parts[0]
        for part in parts[1:]:
            out, lse = merge(out, lse, *part)
        got[0][:, piece] = out
        for other in pieces:
            one = (dout[:, piece], q[:, piece], k[:, other], v[:, other], out, lse)
            shares = landmark_bwd(*one, mine, other[::size], 0.25)
            for whole, at, share in zip(got[1:], (piece, other, other), shares, strict=True):
                whole[:, at] += share
    assert_all(got, truth)


def test_a_query_that_sees_nothing_is_zero_and_does_no_harm() -> None:
    q, k, v = (x.detach() for x in inputs(12))
    rows = QueryRows(torch.arange(12), torch.zeros(12, dtype=torch.int64), 4)
    out, lse = landmark_fwd(q, k, v, rows, torch.tensor([4, 8, 12]), 0.25)
    assert torch.all(lse[..., :4] == -torch.inf) and torch.all(out[:, :4] == 0)
    assert torch.isfinite(lse[..., 4:]).all() and torch.isfinite(out).all()
    grads = landmark_bwd(
        torch.randn_like(out), q, k, v, out, lse, rows, torch.tensor([4, 8, 12]), 0.25
    )
    assert torch.all(grads[0][:, :4] == 0) and all(torch.isfinite(g).all() for g in grads)


def test_lists_of_nothing_and_of_an_empty_table() -> None:
    q, _, _ = (x.detach() for x in inputs(12))
    rows = QueryRows(torch.arange(12), torch.zeros(12, dtype=torch.int64), 4)
    none = torch.full((2, 2, 3, 5), -1, dtype=torch.int32)
    for entries in (0, 3):
        table = torch.randn(entries, 2, 4, 16, dtype=DOUBLE)
        lists = BlockLists(torch.arange(entries), none, torch.full((3,), 4))
        out, lse = sparse_fwd(q, table, lists, rows, 0.25)
        assert torch.all(out == 0) and torch.all(lse == -torch.inf)
        full_lse = torch.zeros_like(lse)
        dq, dtable = sparse_bwd(q, q, table, out, full_lse, lists, rows, 0.25)
        assert torch.all(dq == 0) and torch.all(dtable == 0) and dtable.shape == table.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("choice", CHOICES)
def test_as_good_as_eager_in_low_precision(dtype: torch.dtype, choice: dict[str, Any]) -> None:
    qkv = inputs(257, dtype=dtype)
    dout = torch.randn_like(qkv[0])
    wide = [x.detach().double().requires_grad_() for x in qkv]
    more = {"block_size": 9, **choice}
    truth = with_grads(landmark_reference(*wide, **more), wide, dout.double())
    # The reference in this dtype keeps its sums in fp32: eager torch can do no better.
    eager, got = by_both(qkv, dout, **more)
    for actual, plain, reference in zip(got, eager, truth, strict=True):
        assert actual.dtype == dtype
        # out is kept in the dtype of the model: half a unit in the last place.
        noise = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert_as_good_as_eager(actual, plain, reference, noise)


@pytest.mark.parametrize("choice", [{}, {"top_k": 2, "select_tokens": 64}])
def test_saves_inputs_out_and_lse_alone(choice: dict[str, Any]) -> None:
    q, k, v = inputs(512, (4, 1), dtype=torch.float32)
    with saved_bytes() as saved:
        landmark_attention(q, k, v, block_size=16, impl="torch", **choice)
    elements = 2 * q.numel() + 2 * k.numel() + 2 * 512 * 4
    assert sum(saved.values()) <= 4 * elements + 64


def test_the_grid_by_eye() -> None:
    grid = block_grid(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 9, 4)
    rows, num_slots = grid.rows, grid.num_slots
    assert rows.idx.tolist() == [0, 1, 4, 5, 6, 8, 9, 10, 11] and num_slots == 12
    assert rows.lo.tolist() == [0, 0, 4, 4, 4, 8, 8, 8, 8]
    assert [x.tolist() for x in rows.content] == [
        [0, 1, 4, 5, 6, 8, 9, 10, 10],
        [0, 0, 4, 4, 4, 8, 8, 8, 8],
    ]
    assert block_starts(num_slots, 4).tolist() == [0, 4, 8]
    spread = grid.to_slots(torch.arange(1.0, 10).view(1, 9, 1, 1)).flatten().tolist()
    assert spread == [1, 2, 0, 0, 3, 4, 5, 0, 6, 7, 8, 9]
    whole = torch.zeros(1, 8, 1, 1)
    assert block_grid(None, 8, 4).to_slots(whole) is whole, "without empty slots nothing is copied"
    index, starts = torch.arange(9), torch.tensor([0, 0, 2, 2, 2, 5, 5, 5, 5])
    assert unit_lengths(index, starts, 3).tolist() == [2, 1, 2, 1, 3]
    assert math.prod(unit_lengths(index, starts, 1).tolist()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *WRONG_INPUTS,
        ({"impl": "cuda"}, "is unknown.* auto, triton, torch, reference"),
        ({"block_size": 1}, "block_size = 1"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_k": 1, "select_tokens": 0}, "select_tokens = 0"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, says: str) -> None:
    call = {name: torch.ones(2, 8, n, 16) for name, n in zip("qkv", (4, 2, 2), strict=True)}
    for impl in IMPLS:
        with pytest.raises(ValueError, match=says):
            landmark_attention(**({"block_size": 4, "impl": impl} | call | change))

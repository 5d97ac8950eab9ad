"""Full attention's operators: the reference by hand, the tiled one against it, blocks merged."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels import (
    Rotary,
    full_attention,
    full_reference,
    lssar_attention,
    lssar_reference,
    tiles,
)
from lcdist_kernels.full import (
    full_bwd,
    full_fwd,
    full_partial,
    merge,
    reaches,
    visible,
)
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager, assert_matches

LENGTHS = [1, 63, 100, 257, 512]
HEADS = [(8, 8), (8, 4), (8, 2), (8, 1)]
DOUBLE = torch.float64


def inputs(
    seqlen: int, heads: tuple[int, int] = (4, 2), head_dim: int = 16, dtype: torch.dtype = DOUBLE
) -> list[Tensor]:
    q, k, v = (torch.randn(2, seqlen, n, head_dim, dtype=dtype) for n in (heads[0], *heads[1:] * 2))
    return [x.requires_grad_() for x in (q, k, v)]


def borders(seqlen: int) -> Tensor:
    """Return borders: a document of one token, an empty one, others, padding after the last."""
    inner = {1, seqlen // 3, seqlen // 2, seqlen - seqlen // 7}
    return torch.tensor(sorted([0, min(1, seqlen), *(x for x in inner if x)]), dtype=torch.int32)


def with_grads(out: Tensor, qkv: list[Tensor], dout: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, qkv, dout)]


def test_reference_by_hand() -> None:
    # exp(q . k_j) = 1, 2, 3, 4: the weights are small fractions.
    q = torch.ones(1, 4, 1, 1, dtype=DOUBLE)
    k = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=DOUBLE).log().view(1, 4, 1, 1)
    v = torch.tensor([6.0, 3.0, 1.0, 5.0], dtype=DOUBLE).view(1, 4, 1, 1)
    expected = torch.tensor([6, 4, 15 / 6, 35 / 10], dtype=DOUBLE)
    assert_matches(full_reference(q, k, v).flatten(), expected)
    two_documents = full_reference(q, k, v, cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))
    expected = torch.tensor([6, 4, 1, 23 / 7], dtype=DOUBLE)
    assert_matches(two_documents.flatten(), expected)


def test_reference_scales_and_rotates_by_hand() -> None:
    # A quarter turn a token: q_1 . k_0 = 0, q_2 . k_0 = -a, and so on; scale 2.
    rotary = Rotary(torch.tensor([math.pi / 2], dtype=DOUBLE))
    a = math.log(2) / 2
    q = torch.tensor([1.0, 0.0], dtype=DOUBLE).expand(1, 3, 1, 2)
    v = torch.tensor([[6.0, 0], [3.0, 0], [1.0, 0]], dtype=DOUBLE).view(1, 3, 1, 2)
    out = full_reference(q, a * q, v, rotary=rotary, softmax_scale=2.0)
    # Weights: row 1: 1, 2; row 2: 1/2, 1, 2.
    expected = torch.tensor([6, (6 + 6) / 3, (3 + 3 + 2) / 3.5], dtype=DOUBLE)
    assert_matches(out[0, :, 0, 0], expected)


@pytest.mark.parametrize(
    ("seqlen", "impl", "packed", "heads"),
    covering(
        one(LENGTHS), [("torch", False), ("torch", True), ("auto", False)], one(HEADS), free=2
    ),
)
def test_equals_reference(seqlen: int, heads: tuple[int, int], packed: bool, impl: str) -> None:
    qkv = inputs(seqlen, heads)
    dout = torch.randn_like(qkv[0])
    more = {
        "rotary": Rotary(frequencies(16), 1.1),
        "cu_seqlens": borders(seqlen) if packed else None,
    }
    truth = with_grads(full_reference(*qkv, **more), qkv, dout)
    got = with_grads(full_attention(*qkv, **more, impl=impl), qkv, dout)
    for actual, reference in zip(got, truth, strict=True):
        assert_matches(actual, reference)


@pytest.mark.parametrize("impl", ["torch", "auto", "reference"])
@pytest.mark.parametrize(
    ("attend", "reference"),
    [(full_attention, full_reference), (lssar_attention, lssar_reference)],
)
def test_given_positions_are_those_rotated_by(
    attend: Callable[..., Tensor], reference: Callable[..., Tensor], impl: str
) -> None:
    q, k, v = inputs(20)
    rotary, positions = Rotary(frequencies(16)), torch.randint(0, 500, (2, 20))
    truth = reference(rotary.rotate(q, positions), rotary.rotate(k, positions), v)
    out = attend(q, k, v, rotary=rotary, positions=positions, impl=impl)
    assert_matches(out, truth)


@pytest.mark.parametrize("impl", ["torch", "auto", "reference"])
def test_positions_restart_in_every_document(impl: str) -> None:
    asked: list[list[int]] = []

    class Spy(Rotary):
        def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
            asked.append(positions.tolist())
            return x

    cu_seqlens = torch.tensor([0, 3, 4], dtype=torch.int32)
    full_attention(*inputs(6), rotary=Spy(frequencies(16)), cu_seqlens=cu_seqlens, impl=impl)
    assert asked == 2 * [[0, 1, 2, 0, 0, 1]]


def test_long_rows_and_a_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 32)
    monkeypatch.setattr(tiles, "SHORT_ROW", 0)
    monkeypatch.setattr(tiles, "SCORES_AT_ONCE", 3 * 32 * 32)
    qkv = inputs(203, (6, 3))
    dout = torch.randn_like(qkv[0])
    for cu_seqlens in (None, borders(203)):
        truth = with_grads(full_reference(*qkv, cu_seqlens=cu_seqlens), qkv, dout)
        got = with_grads(full_attention(*qkv, cu_seqlens=cu_seqlens, impl="torch"), qkv, dout)
        for actual, reference in zip(got, truth, strict=True):
            assert_matches(actual, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_as_good_as_eager_in_low_precision(dtype: torch.dtype, impl: str) -> None:
    qkv = inputs(257, dtype=dtype)
    dout = torch.randn_like(qkv[0])
    wide = [x.detach().double().requires_grad_() for x in qkv]
    truth = with_grads(full_reference(*wide), wide, dout.double())

    mask = torch.ones(257, 257, dtype=torch.bool).tril()
    k, v = (x.repeat_interleave(2, 2) for x in qkv[1:])
    scores = torch.einsum("bshd,bthd->bhst", qkv[0], k) * 16**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    eager = with_grads(torch.einsum("bhst,bthd->bshd", weights, v), qkv, dout)

    got = with_grads(full_attention(*qkv, impl=impl), qkv, dout)
    for actual, plain, reference in zip(got, eager, truth, strict=True):
        assert actual.dtype == dtype
        assert_as_good_as_eager(actual, plain, reference)


@pytest.mark.parametrize("cut", ["runs", "stripes", "shuffled"])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_merge_to_the_whole(cut: str, packed: bool) -> None:
    seqlen, blocks = 150, 3
    order = torch.randperm(seqlen) if cut == "shuffled" else torch.arange(seqlen)
    pieces = [order[i::blocks] if cut == "stripes" else order.chunk(3)[i] for i in range(blocks)]
    pieces = [piece.sort().values for piece in pieces]
    qkv = inputs(seqlen)
    dout = torch.randn_like(qkv[0])
    cu_seqlens = borders(seqlen) if packed else None
    truth = with_grads(full_reference(*qkv, cu_seqlens=cu_seqlens), qkv, dout)
    starts = tiled_starts(cu_seqlens, seqlen)

    got = [torch.zeros_like(x) for x in truth]
    q, k, v = (x.detach() for x in qkv)
    for q_idx in pieces:
        band, mine = (q_idx, starts[q_idx]), q[:, q_idx]
        parts = [full_fwd(mine, k[:, b], v[:, b], *band, b, 0.25) for b in pieces]
        dense = [full_partial(mine, k[:, b], v[:, b], visible(*band, b), 0.25) for b in pieces]
        for (out, lse), (out_dense, lse_dense) in zip(parts, dense, strict=True):
            torch.testing.assert_close((out, lse), (out_dense, lse_dense), rtol=1e-10, atol=1e-12)
        out, lse = parts[0]
        for part in parts[1:]:
            out, lse = merge(out, lse, *part)
        got[0][:, q_idx] = out
        for b in pieces:
            one = (dout[:, q_idx], mine, k[:, b], v[:, b], out, lse, *band, b, 0.25)
            for whole, where, share in zip(got[1:], (q_idx, b, b), full_bwd(*one), strict=True):
                whole[:, where] += share
    for actual, reference in zip(got, truth, strict=True):
        assert_matches(actual, reference)


def tiled_starts(cu_seqlens: Tensor | None, seqlen: int) -> Tensor:
    starts = torch.zeros(seqlen, dtype=torch.int64)
    for start, stop in itertools.pairwise([] if cu_seqlens is None else [*cu_seqlens, seqlen]):
        starts[start:stop] = start
    return starts


def test_a_query_that_sees_nothing_is_zero_and_does_no_harm() -> None:
    q, k, v = inputs(10)
    early, late = torch.arange(10), torch.arange(5, 15)
    band = (early, torch.zeros_like(early))
    out, lse = full_fwd(q.detach(), k.detach(), v.detach(), *band, late, 0.25)
    assert torch.all(lse[..., :5] == -torch.inf) and torch.all(out[:, :5] == 0)
    assert torch.isfinite(lse[..., 5:]).all() and torch.isfinite(out).all()

    partial = full_partial(q, k, v, visible(*band, late), 0.25)
    merged = merge(*merge(*partial, *partial), *full_partial(q, k, v, visible(*band, late), 0.25))
    assert torch.all(merged[1][..., :5] == -torch.inf) and torch.all(merged[0][:, :5] == 0)
    assert_matches(merged[0], partial[0])
    for grad in torch.autograd.grad(merged[0].square().sum(), (q, k, v)):
        assert torch.isfinite(grad).all()
    # Of the whole row it sees keys elsewhere: its share here is zero.
    grads = full_bwd(
        torch.randn_like(out), *(x.detach() for x in (q, k, v)), out, lse, *band, late, 0.25
    )
    assert torch.all(grads[0][:, :5] == 0) and all(torch.isfinite(g).all() for g in grads)


def test_merge_keeps_what_extreme_logits_mean() -> None:
    one, two = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 2.0)
    out, lse = merge(one, torch.full((1, 1, 1), 1000.0), two, torch.full((1, 1, 1), 1000.0))
    assert out.item() == 1.5 and lse.item() == pytest.approx(1000 + math.log(2))
    out, lse = merge(one, torch.full((1, 1, 1), -1000.0), two, torch.full((1, 1, 1), 1000.0))
    assert out.item() == 2 and lse.item() == 1000


def test_tiles_out_of_sight_are_skipped() -> None:
    index = torch.arange(300)
    assert not reaches(index[:100], torch.zeros(100), index[100:])
    assert not reaches(index[200:], torch.full((100,), 200), index[:200])
    assert reaches(index[:101], torch.zeros(101), index[100:])
    rows = list(tiles.tiles_of_band(index, torch.zeros_like(index), index, 50, 50, index.device))
    assert [len(seen) for _, _, seen in rows] == [1, 2, 3, 4, 5, 6]
    # Two documents: [0, 100) and [100, 300).
    starts = 100 * (index >= 100)
    packed = tiles.tiles_of_band(index, starts, index, 50, 50, index.device)
    assert [len(seen) for _, _, seen in packed] == [1, 2, 1, 2, 3, 4]
    assert all((t.hidden is None) == (t.k_stop <= start) for start, _, ts in rows for t in ts)


@pytest.mark.parametrize(("impl", "packed"), [("torch", False), ("torch", True), ("auto", False)])
def test_saves_inputs_out_and_lse_alone(impl: str, packed: bool) -> None:
    q, k, v = inputs(512, (4, 1), dtype=torch.float32)
    cu_seqlens = borders(512) if packed else None
    with saved_bytes() as saved:
        full_attention(q, k, v, cu_seqlens=cu_seqlens, impl=impl)
    elements = 2 * q.numel() + 2 * k.numel() + 2 * 512 * 4
    assert sum(saved.values()) <= 4 * elements + 64


# What every method refuses: changes to the arguments, and what the message says.
WRONG_INPUTS: list[tuple[dict[str, Any], str]] = [
    ({"k": torch.ones(2, 8, 3, 16)}, "of one shape"),
    ({"q": torch.ones(2, 7, 4, 16)}, "q has 7 tokens"),
    ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, r"\[0, 9\].*seqlen = 8"),
]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *WRONG_INPUTS,
        ({"k": torch.ones(2, 8, 3, 16), "v": torch.ones(2, 8, 3, 16)}, "multiple of nheads_kv = 3"),
        ({"q": torch.ones(2, 8, 4, 8)}, "head_dim"),
        ({"q": torch.ones(2, 8, 4, 16).double()}, "one floating dtype"),
        ({"impl": "cuda"}, "'cuda' is unknown"),
        ({"cu_seqlens": torch.tensor([1, 8], dtype=torch.int32)}, "start with 0"),
        ({"cu_seqlens": torch.tensor([0, 5, 4], dtype=torch.int32)}, "not decrease"),
        ({"cu_seqlens": torch.zeros(2, 3, dtype=torch.int32)}, "one int32 table"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, says: str) -> None:
    call = {name: torch.ones(2, 8, n, 16) for name, n in zip("qkv", (4, 2, 2), strict=True)}
    with pytest.raises(ValueError, match=says):
        full_attention(**(call | change))

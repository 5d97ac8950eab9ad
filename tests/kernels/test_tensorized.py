"""Tensorized attention's operators: by hand, by loops over fibres, tiled; limits and causality."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels import (
    Rotary,
    full_reference,
    tensorized_attention,
    tensorized_reference,
    tiles,
)
from lcdist_kernels.tensorized import ModeGrid, initial_bias
from tests.kernels.test_full import DOUBLE, HEADS, inputs, with_grads
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one
from tests.tolerance import assert_as_good_as_eager, assert_matches

GRIDS = [
    ModeGrid((5,)),
    ModeGrid((5,), local_blocks=2, pe="mode"),
    ModeGrid((4,), local_blocks=4, pe="global", hop_heads="kv"),
    ModeGrid((3, 2), pe="global"),
    ModeGrid((2, 3, 4), hop_heads="kv"),
]
IMPLS = ["reference", "torch"]


def name(grid: ModeGrid) -> str:
    return f"{grid.modes}-{grid.local_blocks}-{grid.pe}-{grid.hop_heads}".replace(" ", "")


def bias_of(grid: ModeGrid, nheads: int) -> Tensor:
    return torch.randn(len(grid.modes), nheads, dtype=DOUBLE, requires_grad=True)


def aligned_borders(seqlen: int, step: int) -> Tensor:
    """Return borders at multiples of `step`: a short document, an empty one, others, padding."""
    inner = [step * (seqlen * part // 7 // step) for part in (2, 2, 4, 6)]
    return torch.tensor([0, *inner], dtype=torch.int32)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=DOUBLE).view(1, -1, 1, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl: str) -> None:
    # exp(k) = 1, 2, 3, 4: weights of branch 2 count twice. Block 0: U_0 = (6 + 2 3) / 3 and, as
    # query 1 is 2, U_1 = (6 + 4 3) / 5.
    q, k, v = column(1, 2, 1, 1), column(1, 2, 3, 4).log(), column(6, 3, 1, 5)
    out = tensorized_attention(q, k, v, grid=ModeGrid((2,)), impl=impl)
    expected = [6, 18 / 5, (3 * 1 + 2 * 4) / 5, (3 * 1 + 4 * 5 + 4 * 18 / 5) / 11]
    assert_matches(out, column(*expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_more_local_blocks_by_hand(impl: str) -> None:
    # Blocks 1 and 2 are read directly, block 0 through U_0 = U_1 = 4, which counts twice.
    k, v = column(1, 2, 3, 4, 1, 2).log(), column(6, 3, 1, 5, 2, 7)
    out = tensorized_attention(
        torch.ones_like(k), k, v, grid=ModeGrid((2,), local_blocks=2), impl=impl
    )
    near = 3 * 1 + 4 * 5 + 1 * 2
    expected = [6, 4, 15 / 6, 35 / 10, (near + 2 * 4) / 10, (near + 2 * 7 + 4 * 4) / 14]
    assert_matches(out, column(*expected))


class ByLoops:
    """One token, head and key at a time, from the digits alone."""

    def __init__(self, grid: ModeGrid, seqlen: int, scale: float) -> None:
        self.grid, self.seqlen, self.scale = grid, seqlen, scale
        self.sizes, self.last = [*grid.modes, seqlen], len(grid.modes)
        self.strides = [math.prod(grid.modes[:j]) for j in range(self.last + 1)]

    def digits(self, t: int) -> list[int]:
        return [t // a % n for a, n in zip(self.strides, self.sizes, strict=True)]

    def turned(self, x: Tensor, rotary: Rotary, j: int) -> Tensor:
        plain = self.grid.pe == "global" or (j == 0 and self.grid.local_blocks > 1)
        angles = [t if plain else self.digits(t)[j] for t in range(self.seqlen)]
        return rotary.rotate(x, torch.tensor(angles))

    def fibre(self, t: int, j: int) -> list[int]:
        def others(s: int) -> list[int]:
            return [digit for i, digit in enumerate(self.digits(s)) if i != j]

        return [s for s in range(self.seqlen) if others(s) == others(t)]

    def reads(self, t: int, j: int) -> list[int]:
        if j == 0:
            first = max(0, t // self.sizes[0] - self.grid.local_blocks + 1) * self.sizes[0]
            return list(range(first, t + 1))
        mine = self.digits(t)[j]
        return [s for s in self.fibre(t, j) if self.digits(s)[j] <= mine - self.grid.local_blocks]

    def one_head(
        self, qs: list[Tensor], hop_qs: list[Tensor], ks: list[Tensor], v: Tensor, bias: Tensor
    ) -> Tensor:
        """qs, hop_qs, ks: of every mode, rotated, `[s, d]`; bias `[modes]`, with that of mode 1."""
        rows: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.seqlen)]
        u = v
        for j in range(self.last + 1):
            for t, row in enumerate(rows):
                row += [
                    (self.scale * (qs[j][t] @ ks[j][s]) + bias[j], u[s]) for s in self.reads(t, j)
                ]
            fibres = [self.fibre(t, j) for t in range(self.seqlen)]
            weights = [
                (self.scale * (ks[j][keys] @ hop_qs[j][t])).softmax(0)
                for t, keys in enumerate(fibres)
            ]
            u = torch.stack([w @ u[keys] for w, keys in zip(weights, fibres, strict=True)])
        outs = []
        for row in rows:
            logits, values = (torch.stack(x) for x in zip(*row, strict=True))
            outs.append(logits.softmax(0) @ values)
        return torch.stack(outs)


def by_loops(
    qkv: list[Tensor], grid: ModeGrid, bias: Tensor, rotary: Rotary, scale: float
) -> Tensor:
    q, k, v = (x.detach() for x in qkv)
    (batch, seqlen, nheads, _), group = q.shape, q.shape[2] // k.shape[2]
    loops, out = ByLoops(grid, seqlen, scale), torch.zeros_like(q)
    bias = torch.cat((torch.zeros(1, nheads, dtype=bias.dtype), bias))
    qs, ks = ([loops.turned(x, rotary, j) for j in range(loops.last + 1)] for x in (q, k))
    for b in range(batch):
        for h in range(nheads):
            own, kv = h // group * group, h // group
            mine = [x[b, :, h] for x in qs]
            means = [x[b, :, own : own + group].mean(1) for x in qs]
            hops = means if grid.hop_heads == "kv" else mine
            keys = [x[b, :, kv] for x in ks]
            out[b, :, h] = loops.one_head(mine, hops, keys, v[b, :, kv], bias[:, h])
    return out


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_reference_equals_loops_over_fibres(grid: ModeGrid) -> None:
    qkv, rotary = inputs(27, (2, 1), 8), Rotary(frequencies(8), 1.1)
    bias = bias_of(grid, 2).detach()
    out = tensorized_reference(*qkv, grid=grid, branch_bias=bias, rotary=rotary, softmax_scale=0.4)
    assert_matches(out, by_loops(qkv, grid, bias, rotary, 0.4))


@pytest.mark.parametrize(
    ("grid", "seqlen", "heads", "packed"),
    covering(one(GRIDS), one([1, 63, 100, 257]), one(HEADS), one([False, True]), free=2),
)
def test_tiled_equals_reference(
    grid: ModeGrid, seqlen: int, heads: tuple[int, int], packed: bool
) -> None:
    qkv, bias = inputs(seqlen, heads, 8), bias_of(grid, heads[0])
    dout = torch.randn_like(qkv[0])
    more = {
        "grid": grid,
        "branch_bias": bias,
        "rotary": Rotary(frequencies(8), 1.1),
        "cu_seqlens": aligned_borders(seqlen, grid.block) if packed else None,
    }
    truth = with_grads(tensorized_reference(*qkv, **more), [*qkv, bias], dout)
    for impl in ("torch", "auto") if seqlen == 63 else ("torch",):
        got = with_grads(tensorized_attention(*qkv, **more, impl=impl), [*qkv, bias], dout)
        for actual, reference in zip(got, truth, strict=True):
            assert_matches(actual, reference)


def test_long_fibres_and_a_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "SHORT_BLOCK", 16)
    monkeypatch.setattr(tiles, "SCORES_AT_ONCE", 3 * 16 * 16)
    for grid in (ModeGrid((40,), local_blocks=2), ModeGrid((36, 2), hop_heads="kv")):
        qkv, bias = inputs(350, (4, 2), 8), bias_of(grid, 4)
        dout, more = torch.randn_like(qkv[0]), {"grid": grid, "branch_bias": bias}
        truth = with_grads(tensorized_reference(*qkv, **more), [*qkv, bias], dout)
        got = with_grads(tensorized_attention(*qkv, **more, impl="torch"), [*qkv, bias], dout)
        for actual, reference in zip(got, truth, strict=True):
            assert_matches(actual, reference)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "grid",
    [
        ModeGrid(()),
        ModeGrid((40,)),
        ModeGrid((64,), local_blocks=2),
        ModeGrid((1, 40)),
        ModeGrid((40, 1)),
        ModeGrid((6,), local_blocks=7),
        ModeGrid((6,), local_blocks=7, pe="global", hop_heads="kv"),
    ],
    ids=name,
)
def test_limits_are_full_attention(grid: ModeGrid, impl: str) -> None:
    qkv, rotary = inputs(40), Rotary(frequencies(16), 1.1)
    dout = torch.randn_like(qkv[0])
    truth = with_grads(full_reference(*qkv, rotary=rotary), qkv, dout)
    # Of branches that read nothing; that of stride 1 does, with log 1.
    bias = bias_of(grid, 4) if grid.strides[1:2] != (1,) else initial_bias(grid.modes, 4)
    more = {"grid": grid, "branch_bias": bias, "rotary": rotary, "impl": impl}
    out = tensorized_attention(*qkv, **more)
    for actual, reference in zip(with_grads(out, qkv, dout), truth, strict=True):
        assert_matches(actual, reference)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1, 40, 100])
def test_one_coarse_mode_of_single_tokens_is_full_attention(size: int, impl: str) -> None:
    # Blocks of one token: branch 1 is the token itself, branch 2 all before it; no bias, log 1.
    qkv = inputs(40)
    modes = (1,) if size == 1 else (1, size)
    out = tensorized_attention(*qkv, grid=ModeGrid(modes), impl=impl)
    assert_matches(out, full_reference(*qkv))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grid", [*GRIDS, ModeGrid((2, 2, 2, 2))], ids=name)
def test_equal_scores_give_the_causal_mean(grid: ModeGrid, impl: str) -> None:
    q, k, v = (x.detach() for x in inputs(50))
    mean = v.cumsum(1) / torch.arange(1, 51)[:, None, None]
    out = tensorized_attention(torch.zeros_like(q), k, v, grid=grid, impl=impl)
    assert_matches(out, mean.repeat_interleave(2, 2))
    bias = torch.zeros(len(grid.modes), 4, dtype=DOUBLE)
    plain = tensorized_attention(torch.zeros_like(q), k, v, grid=grid, branch_bias=bias, impl=impl)
    assert (plain - mean.repeat_interleave(2, 2)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("grid", "impl", "pe"),
    covering(
        one([*GRIDS, ModeGrid((2, 2, 2))]), one(IMPLS), one(["none", "mode", "global"]), free=2
    ),
)
def test_every_token_reaches_every_later_one_and_none_before(
    grid: ModeGrid, pe: str, impl: str
) -> None:
    grid = ModeGrid(grid.modes, grid.local_blocks, "mode" if pe == "none" else pe, grid.hop_heads)
    rotary = None if pe == "none" else Rotary(frequencies(8))
    x = torch.randn(1, 26, 4, 8, dtype=DOUBLE)

    def of(x: Tensor) -> Tensor:
        more = {"grid": grid, "rotary": rotary, "impl": impl}
        return tensorized_attention(x[:, :, :2], x[:, :, 2:3], x[:, :, 3:], **more)

    x.requires_grad_()
    out = of(x)
    reached = torch.zeros(26, 26)
    for t in range(26):
        (grad,) = torch.autograd.grad(out[:, t].sum(), x, retain_graph=True)
        reached[t] = grad.abs().amax((0, 2, 3))
    assert torch.equal(reached != 0, torch.ones(26, 26).tril().bool())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_it_is_a_matrix_of_rows_that_sum_to_one(grid: ModeGrid, impl: str) -> None:
    q, k, v = (x.detach()[:1] for x in inputs(24, (2, 1), 24))
    unit = torch.eye(24, dtype=DOUBLE)[None, :, None]
    matrix = tensorized_attention(q, k, unit, grid=grid, impl=impl)[0].transpose(0, 1)
    assert torch.equal(matrix, matrix.tril()) and (matrix >= 0).all()
    assert_matches(matrix.sum(-1), torch.ones(2, 24, dtype=DOUBLE))
    out = tensorized_attention(q, k, v, grid=grid, impl=impl)
    assert_matches(out[0].transpose(0, 1), matrix @ v[0, :, 0])


def test_the_gradient_of_the_bias() -> None:
    # dbias = sum over tokens of e^(lse_2 - lse) dout . (out_2 - out), branch 2 on its own.
    grid, seqlen = ModeGrid((4,)), 22
    q, k, v = inputs(seqlen, (1, 1), 8)
    bias, dout = bias_of(grid, 1), torch.randn(2, seqlen, 1, 8, dtype=DOUBLE)
    place = torch.arange(seqlen)
    scores = torch.einsum("bshd,bthd->bst", q, k) * 8**-0.5
    hop = scores.masked_fill(place[:, None] // 4 != place[None] // 4, -torch.inf).softmax(-1)
    u = hop @ v[:, :, 0]
    own = grid.branch_mask(place, place, 0)
    far = grid.branch_mask(place, place, 1)
    weights = torch.where(own, scores, torch.where(far, scores + bias[0, 0], -torch.inf)).softmax(
        -1
    )
    out = (weights * own) @ v[:, :, 0] + (weights * far) @ u
    share = (weights * far).sum(-1, keepdim=True)
    inner = (dout[:, :, 0] * ((weights * far) @ u - share * out)).sum()
    for impl in IMPLS:
        got = tensorized_attention(q, k, v, grid=grid, branch_bias=bias, impl=impl)
        assert_matches(got[:, :, 0], out)
        (dbias,) = torch.autograd.grad(got, bias, dout)
        assert_matches(dbias, inner.view(1, 1))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_a_tail_of_padding_changes_nothing(grid: ModeGrid, impl: str) -> None:
    qkv = [x.detach() for x in inputs(60)]
    whole = tensorized_attention(*qkv, grid=grid, impl=impl)
    for seqlen in (1, 23, 59):
        cut = tensorized_attention(*(x[:, :seqlen] for x in qkv), grid=grid, impl=impl)
        assert_matches(cut, whole[:, :seqlen])


@pytest.mark.parametrize("grid", GRIDS, ids=name)
def test_documents_are_sequences_of_their_own(grid: ModeGrid) -> None:
    rotary, step = Rotary(frequencies(16)), grid.block
    q, k, v = inputs(3 * step + 7)
    dout = torch.randn_like(q)
    for impl, ends in (("reference", (2, 13, 13)), ("torch", (step, 2 * step, 2 * step))):
        borders = [0, *ends, q.shape[1]]
        more = {"grid": grid, "rotary": rotary, "impl": impl}
        alone = [
            tensorized_attention(q[:, a:b], k[:, a:b], v[:, a:b], **more)
            for a, b in pairwise(borders)
            if a < b
        ]
        truth = with_grads(torch.cat(alone, 1), [q, k, v], dout)
        table = torch.tensor(borders[:-1], dtype=torch.int32)
        got = with_grads(tensorized_attention(q, k, v, cu_seqlens=table, **more), [q, k, v], dout)
        for actual, reference in zip(got, truth, strict=True):
            assert_matches(actual, reference)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "grid", [ModeGrid((5,)), ModeGrid((5,), pe="global"), ModeGrid(())], ids=name
)
def test_given_positions_are_those_rotated_by(grid: ModeGrid, impl: str) -> None:
    q, k, v = inputs(23)
    rotary, places = Rotary(frequencies(16)), torch.arange(23).expand(2, 23)
    plain = tensorized_attention(q, k, v, grid=grid, rotary=rotary, impl=impl)
    more = {"grid": grid, "rotary": rotary, "impl": impl}
    assert_matches(tensorized_attention(q, k, v, positions=places, **more), plain)
    # Every distance twice as long, by half the frequencies.
    slow = Rotary(frequencies(16) / 2)
    if grid.pe == "global" or not grid.modes:
        more["rotary"] = slow
        assert_matches(tensorized_attention(q, k, v, positions=2 * places, **more), plain)


def saved_by(out: Tensor) -> dict[int, tuple[int, ...]]:
    function = out.grad_fn
    while function is not None and "Tensorized" not in type(function).__name__:
        function = function.next_functions[0][0]
    assert function is not None
    return {x.data_ptr(): tuple(x.shape) for x in function.saved_tensors}  # pyright: ignore


@pytest.mark.parametrize(("hop_heads", "width"), [("q", 4), ("kv", 2)])
def test_what_is_kept_for_the_backward(hop_heads: str, width: int) -> None:
    qkv = inputs(96, (4, 2), 8)
    out = tensorized_attention(*qkv, grid=ModeGrid((4, 3), hop_heads=hop_heads), impl="torch")
    fibres = [(2 * 24, width, 4), (2 * 8, 4 * width, 3)]
    hops = [(2, 96, width, 8)] * 2
    expected = [(2, 96, 4, 8)] * 2 + [(2, 96, 2, 8)] * 2 + [(2, 4, 96), (2, 4)] + hops + fibres
    assert sorted(saved_by(out).values()) == sorted(expected)


@pytest.mark.parametrize(
    ("grid", "dtype"),
    covering(one(GRIDS), one([torch.bfloat16, torch.float16, torch.float32])),
)
def test_as_good_as_eager_in_low_precision(dtype: torch.dtype, grid: ModeGrid) -> None:
    qkv, bias = inputs(257, dtype=dtype), bias_of(grid, 4).detach().float().requires_grad_()
    dout = torch.randn_like(qkv[0])
    wide = [x.detach().double().requires_grad_() for x in (*qkv, bias)]
    more = {"grid": grid, "branch_bias": wide[3]}
    truth = with_grads(tensorized_reference(*wide[:3], **more), wide, dout.double())
    leaves, more = [*qkv, bias], {"grid": grid, "branch_bias": bias}
    # The reference in this dtype keeps its sums and the U_j in fp32: eager can do no better.
    eager = with_grads(tensorized_reference(*qkv, **more), leaves, dout)
    got = with_grads(tensorized_attention(*qkv, **more, impl="torch"), leaves, dout)
    for actual, plain, reference in zip(got, eager, truth, strict=True):
        assert actual.dtype == plain.dtype
        # out and the U_j are kept in the dtype of the model: half a unit in the last place.
        noise = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert_as_good_as_eager(actual, plain, reference, noise)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_are_no_harm_and_a_shift_of_all_scores_changes_nothing(impl: str) -> None:
    q, k, v = inputs(50, dtype=torch.float32)
    out = tensorized_attention(q, k, v, grid=ModeGrid((4,)), softmax_scale=80.0, impl=impl)
    grads = torch.autograd.grad(out, [q, k, v], torch.randn_like(out))
    assert all(torch.isfinite(x).all() for x in (out, *grads))
    # One feature of queries is 1, and of keys the shift.
    q, k, v = (x.detach() for x in inputs(50))
    q[..., 0], k[..., 0] = 1.0, 0.0
    plain = tensorized_attention(q, k, v, grid=ModeGrid((3, 2)), impl=impl)
    k[..., 0] = 50.0
    assert_matches(tensorized_attention(q, k, v, grid=ModeGrid((3, 2)), impl=impl), plain)


def test_initial_bias_is_log_strides() -> None:
    expected = torch.tensor([[4.0] * 3, [12.0] * 3, [24.0] * 3], dtype=DOUBLE).log()
    assert_matches(initial_bias((4, 3, 2), 3), expected)
    assert initial_bias((), 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": torch.ones(2, 8, 3, 16)}, "of one shape"),
        ({"q": torch.ones(2, 7, 4, 16)}, "q has 7 tokens"),
        ({"impl": "cuda"}, "is unknown: .* auto, triton, torch, reference"),
        ({"branch_bias": torch.zeros(1, 2)}, r"branch_bias of shape \(1, 2\): expected \[1, 4\]"),
        (
            {"cu_seqlens": torch.tensor([0, 4, 7], dtype=torch.int32)},
            "document 2 starts at token 7, as document 1 has 3 tokens.*multiple of 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], says: str) -> None:
    call = {name: torch.ones(2, 8, n, 16) for name, n in zip("qkv", (4, 2, 2), strict=True)}
    call |= {"grid": ModeGrid((4,)), "impl": "torch"}
    with pytest.raises(ValueError, match=says):
        tensorized_attention(**(call | change))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"modes": (4, 0)}, r"modes = \(4, 0\)"),
        ({"modes": (4,), "local_blocks": 0}, "local_blocks = 0"),
        ({"modes": (4, 2), "local_blocks": 2}, r"local_blocks = 2 with modes = \(4, 2\)"),
        ({"modes": (4,), "pe": "rope"}, "pe = 'rope': must be one of mode, global"),
        ({"modes": (4,), "hop_heads": "k"}, "hop_heads = 'k': must be one of q, kv"),
    ],
)
def test_a_grid_that_is_none_is_refused(words: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModeGrid(**words)

"""LSSA and LSSAR's operators: golden values, the published form, the tiled one, blocks added."""

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary, lssar_attention, lssar_reference, tiles
from lcdist_kernels.full import visible
from lcdist_kernels.lssar import (
    Band,
    Reweight,
    directions,
    divisor,
    logit_scales,
    lssar_block,
    lssar_bwd,
    lssar_finish,
    lssar_fwd,
    lssar_rows,
    lssar_sums,
    mean_shares,
    no_threshold,
    row_threshold,
    softplus_scores,
)
from tests.kernels.helpers import rotated_and_packed
from tests.kernels.test_full import (
    DOUBLE,
    HEADS,
    WRONG_INPUTS,
    borders,
    inputs,
    tiled_starts,
    with_grads,
)
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one
from tests.tolerance import assert_as_good_as_eager, assert_matches

LENGTHS = [1, 63, 100, 257]
MODES = [None, Reweight(), Reweight(power=3.0), Reweight(power=2.5, exempt_rows=0)]

# out[5], dq[5], dk[1], dv[1] of the specification's small example, to six decimals.
GOLDEN = {
    "lssa": (
        None,
        (0.801697, -0.265863, -0.191347, 0.065645),
        (-0.077445, -0.036266, -0.078099, -0.081439),
        (-0.289220, 0.079191, 0.124918, -0.202210),
        (0.625451, 0.160104, -0.361172, -0.756280),
    ),
    "lssar-3": (
        Reweight(power=3.0),
        (0.889964, -0.436560, -0.623673, 0.342300),
        (-0.058320, 0.413629, 0.628343, 0.461377),
        (0.001908, 0.029450, -0.013991, -0.062509),
        (0.297025, 0.152711, -0.044949, -0.226908),
    ),
    "lssar-15": (
        Reweight(),
        (0.959622, -0.205037, -0.933000, 0.072021),
        (-0.073365, 0.521058, 0.791566, 0.581258),
        (0.003841, 0.001516, -0.002787, -0.002785),
        (0.004233, 0.002481, -0.000138, -0.002708),
    ),
}


def by_both(qkv: list[Tensor], dout: Tensor, **asked) -> list[list[Tensor]]:
    """[out, dq, dk, dv] of the reference and of the tiled operator."""
    return [
        with_grads(lssar_attention(*qkv, impl=impl, **asked), qkv, dout)
        for impl in ("reference", "torch")
    ]


def assert_all(actual: list[Tensor], reference: list[Tensor]) -> None:
    for a, r in zip(actual, reference, strict=True):
        assert_matches(a, r)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(name: str) -> None:
    i, j = torch.arange(6, dtype=DOUBLE)[:, None], torch.arange(4, dtype=DOUBLE)
    q, k = (0.7 * i + 1.3 * j + 0.1).sin(), (0.9 * i - 0.8 * j + 0.2).cos()
    v, dout = (0.5 * i * (j + 1) + 0.3).sin(), (0.4 * i + 0.6 * j).cos()
    qkv = [x.view(1, 6, 1, 4).requires_grad_() for x in (q, k, v)]
    reweight, *expected = GOLDEN[name]
    for got in by_both(qkv, dout.view(1, 6, 1, 4), reweight=reweight):
        rows = [x[0, row, 0] for x, row in zip(got, (5, 5, 1, 1), strict=True)]
        for row, values in zip(rows, expected, strict=True):
            torch.testing.assert_close(row, torch.tensor(values, dtype=DOUBLE), rtol=0, atol=5.1e-7)


def published(q: Tensor, k: Tensor, v: Tensor, scale: float, power: float | None) -> Tensor:
    """Compute the paper's two L1 normalisations as written, without eps; power None: LSSA."""
    q, k = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (q, k))
    count = torch.arange(1, q.shape[1] + 1, dtype=DOUBLE)[:, None]
    scores = scale * count.log() * torch.einsum("bshd,bthd->bhst", q, k)
    a = (1 + scores.exp()).log().tril()
    a = a / a.sum(-1, keepdim=True)
    if power is not None:
        a = (count * a - (count > 3).double()).relu().tril() ** power
        a = a / a.sum(-1, keepdim=True)
    return torch.einsum("bhst,bthd->bshd", a, v)


@pytest.mark.parametrize("power", [None, 2.0, 3.0, 15.0])
@pytest.mark.parametrize("scale", [None, 1.3])
def test_equals_the_published_form(power: float | None, scale: float | None) -> None:
    qkv = inputs(40, (3, 3))
    dout = torch.randn_like(qkv[0])
    factor = torch.tensor(16.0, dtype=DOUBLE).log().item() if scale is None else scale
    truth = with_grads(published(*qkv, factor, power), qkv, dout)
    reweight = None if power is None else Reweight(power=power)
    for got in by_both(qkv, dout, reweight=reweight, softmax_scale=scale):
        assert_all(got, truth)


@pytest.mark.parametrize(
    ("seqlen", "reweight", "heads", "packed"),
    covering(one(LENGTHS), one(MODES), one(HEADS), one([False, True]), free=2),
)
def test_equals_reference(
    seqlen: int, heads: tuple[int, int], packed: bool, reweight: Reweight | None
) -> None:
    qkv = inputs(seqlen, heads)
    more = {"reweight": reweight, **rotated_and_packed(seqlen, 16, packed)}
    truth, got = by_both(qkv, torch.randn_like(qkv[0]), **more)
    assert_all(got, truth)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("exempt_rows", [0, 1, 70, 200])
def test_small_powers_and_exempt_rows(power: float, exempt_rows: int) -> None:
    qkv = inputs(100)
    reweight = Reweight(power=power, exempt_rows=exempt_rows)
    truth, got = by_both(qkv, torch.randn_like(qkv[0]), reweight=reweight, cu_seqlens=borders(100))
    assert all(torch.isfinite(x).all() for x in truth)
    assert_all(got, truth)
    if power == 1 and exempt_rows == 200:
        assert_matches(truth[0], lssar_reference(*qkv, reweight=None, cu_seqlens=borders(100)))


@pytest.mark.parametrize("reweight", MODES)
def test_documents_are_sequences_of_their_own(reweight: Reweight | None) -> None:
    q, k, v = inputs(30)
    cu_seqlens = torch.tensor([0, 2, 13, 13], dtype=torch.int32)
    rotary = Rotary(frequencies(16))
    alone = [
        lssar_reference(q[:, a:b], k[:, a:b], v[:, a:b], reweight=reweight, rotary=rotary)
        for a, b in ((0, 2), (2, 13), (13, 30))
    ]
    for impl in ("reference", "torch"):
        more = {"reweight": reweight, "rotary": rotary, "cu_seqlens": cu_seqlens}
        assert_matches(lssar_attention(q, k, v, impl=impl, **more), torch.cat(alone, 1))


@pytest.mark.parametrize("reweight", MODES)
def test_only_directions_matter_and_a_rotary_factor_scales_the_logit(
    reweight: Reweight | None,
) -> None:
    q, k, v = inputs(40)
    wide = torch.rand(2, 40, 4, 1, dtype=DOUBLE) + 0.5
    for impl in ("reference", "torch"):
        plain = lssar_attention(q, k, v, reweight=reweight, softmax_scale=1.44, impl=impl)
        longer = lssar_attention(
            q * wide, k * wide[:, :, :2], v, reweight=reweight, softmax_scale=1.44, impl=impl
        )
        assert_matches(longer, plain)
        still = Rotary(torch.zeros(8, dtype=DOUBLE), 1.2)
        factor = lssar_attention(
            q, k, v, reweight=reweight, rotary=still, softmax_scale=1.0, impl=impl
        )
        assert_matches(factor, plain)


def test_long_rows_and_a_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "BLOCK", 32)
    monkeypatch.setattr(tiles, "SHORT_ROW", 0)
    monkeypatch.setattr(tiles, "SCORES_AT_ONCE", 3 * 32 * 32)
    qkv = inputs(150, (6, 3))
    for reweight in (None, Reweight()):
        truth, got = by_both(
            qkv, torch.randn_like(qkv[0]), reweight=reweight, cu_seqlens=borders(150)
        )
        assert_all(got, truth)


@pytest.mark.parametrize("cut", ["runs", "stripes", "shuffled"])
@pytest.mark.parametrize("reweight", MODES)
def test_blocks_add_up_to_the_whole(cut: str, reweight: Reweight | None) -> None:
    order = torch.randperm(120) if cut == "shuffled" else torch.arange(120)
    pieces = [order[i::3] if cut == "stripes" else order.chunk(3)[i] for i in range(3)]
    pieces = [piece.sort().values for piece in pieces]
    q, k, v = (x.detach() for x in inputs(120))
    starts = tiled_starts(borders(120), 120)
    counts, dout = torch.arange(120) - starts + 1, torch.randn_like(q)
    q, k = directions(q, None, starts), directions(k, None, starts)
    q = (q * logit_scales(counts, None, q)).requires_grad_()
    k, v = k.requires_grad_(), v.requires_grad_()

    scores = softplus_scores(q, k, visible(torch.arange(120), starts, torch.arange(120)))
    limits = no_threshold(q)
    if reweight is not None:
        shares = mean_shares(counts, reweight, q)
        limits = row_threshold(scores.sum(-1), scores.amax(-1), shares)
    out, total = lssar_block(scores, v, limits, reweight)
    truth = with_grads(out / divisor(total), [q, k, v], dout)

    got = [torch.zeros_like(x) for x in truth]
    q, k, v = (x.detach() for x in (q, k, v))
    for q_idx in pieces:
        bands = [Band(q_idx, starts[q_idx], b) for b in pieces]
        mine, shares = q[:, q_idx], mean_shares(counts[q_idx], reweight, q)
        limits = no_threshold(mine)
        if reweight is not None:
            firsts = [lssar_sums(mine, k[:, band.k_idx], band) for band in bands]
            total, top = (torch.stack(x) for x in zip(*firsts, strict=True))
            limits = row_threshold(total.sum(0), top.amax(0), shares)
        parts = [
            lssar_fwd(mine, k[:, b.k_idx], v[:, b.k_idx], b, limits, reweight, True) for b in bands
        ]
        done = lssar_finish(parts[0].plus(parts[1]).plus(parts[2]), limits, reweight)
        got[0][:, q_idx] = done.out
        rows = lssar_rows(dout[:, q_idx], *done, bands[0], reweight)
        for b in bands:
            one = (dout[:, q_idx], mine, k[:, b.k_idx], v[:, b.k_idx], b, rows, reweight)
            for whole, at, share in zip(
                got[1:], (q_idx, b.k_idx, b.k_idx), lssar_bwd(*one), strict=True
            ):
                whole[:, at] += share
    assert_all(got, truth)


def one_match(cosine: float) -> list[Tensor]:
    """1024 tokens whose last query matches its own key, and has `cosine` with every other."""
    other = torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    match = torch.tensor([1.0, 0.0])
    k = torch.cat([other.expand(1023, 2), match[None]]).repeat(1, 32).view(1, 1024, 1, 64)
    q = match.repeat(1024, 32).view(1, 1024, 1, 64)
    return [q.clone(), k.clone(), torch.randn(1, 1024, 1, 64)]


def test_a_row_with_one_match_does_not_overflow() -> None:
    # N A of the match is about 1000, and 1000^15 is beyond fp32.
    qkv = [x.requires_grad_() for x in one_match(-0.5)]
    for got in by_both(qkv, torch.randn(1, 1024, 1, 64)):
        assert all(torch.isfinite(x).all() for x in got)
        assert_matches(got[0][0, -1], qkv[2][0, -1], 1e-6)


def test_a_nearly_flat_row_is_not_silenced() -> None:
    # The greatest N A is about 1.1: relu(N A - 1)^15 is 1e-15, which an eps of 1e-8 would hide.
    q, k, v = one_match(0.9)
    for impl in ("reference", "torch"):
        out = lssar_attention(q, k, v, impl=impl)
        assert_matches(out[0, -1], v[0, -1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("zero", [False, True])
def test_flat_rows_are_zero_and_do_no_harm(dtype: torch.dtype, zero: bool) -> None:
    qkv = inputs(300, dtype=dtype)
    qkv[1] = qkv[1].detach()[:, :1].expand(2, 300, 2, 16).clone().requires_grad_()
    if zero:
        qkv[0] = torch.zeros_like(qkv[0]).requires_grad_()
    for out, *grads in by_both(qkv, torch.randn_like(qkv[0])):
        # The exempt rows average what they see.
        first = qkv[2][:, :1].repeat_interleave(2, 2)
        assert_matches(out[:, :1], first, 1e-6)
        assert torch.all(out[:, 3:] == 0) and torch.any(out[:, 1:3] != 0)
        assert all(torch.isfinite(x).all() for x in grads)
        assert torch.all(grads[2][:, 3:] == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reweight", [None, Reweight(power=3.0), Reweight()])
def test_as_good_as_eager_in_low_precision(dtype: torch.dtype, reweight: Reweight | None) -> None:
    qkv = inputs(257, dtype=dtype)
    dout = torch.randn_like(qkv[0])
    wide = [x.detach().double().requires_grad_() for x in qkv]
    truth = with_grads(lssar_reference(*wide, reweight=reweight), wide, dout.double())
    # The reference in this dtype keeps its sums in fp32: eager torch can do no better.
    eager = with_grads(lssar_reference(*qkv, reweight=reweight), qkv, dout)
    got = with_grads(lssar_attention(*qkv, reweight=reweight, impl="torch"), qkv, dout)
    for actual, plain, reference in zip(got, eager, truth, strict=True):
        assert actual.dtype == dtype
        # out and its slope are kept in the dtype of the model: half a unit in the last place.
        noise = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        assert_as_good_as_eager(actual, plain, reference, noise)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        *WRONG_INPUTS,
        ({"impl": "cuda"}, "unknown: lssar attention has auto, triton, torch, reference"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, says: str) -> None:
    call = {name: torch.ones(2, 8, n, 16) for name, n in zip("qkv", (4, 2, 2), strict=True)}
    with pytest.raises(ValueError, match=says):
        lssar_attention(**(call | change))

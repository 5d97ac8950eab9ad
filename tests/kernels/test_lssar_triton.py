"""LSSA's and LSSAR's kernels: against the dense reference, block by block, on a ring, and refused.

Without a GPU they run in Triton's interpreter; tests marked `gpu` need one.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.config.schema import LssarOptions
from lcdist_kernels import Rotary, lssar_attention, lssar_reference, triton_common
from lcdist_kernels.lssar import (
    TORCH_IMPL,
    TRITON_IMPL,
    Band,
    LssarImpl,
    Reweight,
    Threshold,
    directions,
    logit_scales,
    lssar_finish,
    mean_shares,
    no_threshold,
    row_threshold,
    select_lssar_impl,
)
from lcdist_kernels.lssar.directions_kernel import DirectionTables, directions_bwd, directions_of
from lcdist_kernels.lssar.rows import RowResults, kernel_logit_scales
from lcdist_kernels.lssar.tiled import RowStats, Sums
from lcdist_kernels.triton_common import Launch
from tests.attention.body import make, on_virtual_ranks
from tests.kernels.helpers import (
    FP32,
    HERE,
    SHAPES,
    SMALL,
    assert_close,
    in_nan,
    on_device,
    on_its_device,
    truth_by,
)
from tests.kernels.repeat import assert_same_bits, large_tensor
from tests.kernels.test_compiles import compiles
from tests.kernels.test_full import borders, tiled_starts, with_grads
from tests.kernels.test_full_triton import cuts
from tests.kernels.test_lssar import one_match
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one, tiered
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager, assert_matches

FLOAT = torch.float32
LSSA, SHARP, CUBE = None, Reweight(), Reweight(power=3.0)
UNEVEN = Reweight(power=2.5, exempt_rows=0)


LN2, LOG2E = math.log(2), 1 / math.log(2)


def torch_in_base_2() -> LssarImpl:
    """Return the torch implementation with the units of the kernels: scores times log2 e."""

    def sums(q: Tensor, k: Tensor, band: Band) -> tuple[Tensor, ...]:
        return tuple(x * LOG2E for x in TORCH_IMPL.sums(q * LN2, k, band))

    def fwd(q: Tensor, k: Tensor, v: Tensor, band: Band, limits: Threshold, *more: Any) -> Sums:
        limits = Threshold(limits.mean * LN2, limits.inverse * LOG2E)
        return TORCH_IMPL.fwd(q * LN2, k, v, band, limits, *more)

    def whole(q: Tensor, *more: Any) -> RowResults:
        done = TORCH_IMPL.whole(q * LN2, *more)
        return done._replace(mean=done.mean * LOG2E, gamma=done.gamma * LN2)

    def rows(dout: Tensor, out: Tensor, slope: Any, mean: Tensor, gamma: Tensor, *more: Any) -> Any:
        saved = TORCH_IMPL.rows(dout, out, slope, mean * LN2, gamma * LOG2E, *more)
        return RowStats(mean, gamma, saved.delta, saved.drift * LN2)

    def bwd(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, band: Band, row: RowStats, *more: Any):
        mean, gamma, delta, drift = row
        row = RowStats(mean * LN2, gamma * LOG2E, delta, drift * LOG2E)
        dq, dk, dv = TORCH_IMPL.bwd(dout, q * LN2, k, v, band, row, *more)
        return dq * LN2, dk, dv

    return LssarImpl(sums, fwd, whole, rows, bwd)


BASE_2 = torch_in_base_2()


truth_of = truth_by(lssar_reference)


@pytest.mark.parametrize(
    ("seqlen", "heads", "head_dim", "packed", "reweight"),
    covering(SHAPES, [(False, SHARP), (True, LSSA), (True, SHARP)]),
)
def test_equals_reference(
    seqlen: int, heads: tuple[int, int], head_dim: int, packed: bool, reweight: Reweight | None
) -> None:
    qkv = [x.detach()[:1].requires_grad_() for x in on_device(seqlen, heads, head_dim, FLOAT)]
    dout = torch.randn_like(qkv[0])
    more = {
        "rotary": Rotary(frequencies(head_dim), 1.1),
        "cu_seqlens": borders(seqlen) if packed else None,
        "reweight": reweight,
    }
    got = with_grads(lssar_attention(*qkv, **more, impl="triton"), qkv, dout)
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, truth_of(qkv, dout, **more))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
def test_powers_below_1_are_refused_in_half_precision(impl: str, dtype: torch.dtype) -> None:
    qkv = on_device(10, (2, 1), 16, dtype)
    said = rf"power = 0.5 with {dtype}: .* use a power of at least 1, or float32"
    with pytest.raises(ValueError, match=said):
        lssar_attention(*qkv, reweight=Reweight(power=0.5), impl=impl)
    lssar_attention(*qkv, reweight=Reweight(power=1.0), impl="torch")


@pytest.mark.parametrize(
    ("power", "exempt_rows"),
    covering(one([0.5, 1.0, 1.5, 2.0, 3.0, 6.0, 40.0, 100.0]), one([0, 3, 200])),
)
def test_powers_and_exempt_rows(power: float, exempt_rows: int) -> None:
    qkv = on_device(70, (2, 1), 16, FLOAT)
    dout = torch.randn_like(qkv[0])
    more = {
        "reweight": Reweight(power=power, exempt_rows=exempt_rows),
        "cu_seqlens": borders(70),
    }
    got = with_grads(lssar_attention(*qkv, **more, impl="triton"), qkv, dout)
    assert_close(got, truth_of(qkv, dout, **more))


def eager(qkv: list[Tensor], dout: Tensor, reweight: Reweight | None) -> list[Tensor]:
    """Products in the dtype of the model and all else in fp32, as under autocast."""
    dtype, group = qkv[0].dtype, qkv[0].shape[2] // qkv[1].shape[2]
    counts = torch.arange(1, qkv[0].shape[1] + 1)
    positions = counts - 1
    q, k = (directions(x, None, positions) for x in qkv[:2])
    q = (q * logit_scales(counts, None, q)).to(dtype)
    k, v = (x.to(dtype).repeat_interleave(group, 2) for x in (k, qkv[2]))
    scores = torch.einsum("bshd,bthd->bhst", q, k).float()
    f = torch.logaddexp(scores, torch.zeros_like(scores)).tril()
    weights = f
    if reweight is not None:
        mean = f.sum(-1) * mean_shares(counts, reweight, f)
        y = (f - mean[..., None]).relu().tril()
        weights = (y / y.detach().amax(-1, keepdim=True)) ** reweight.power
    weights = weights / weights.sum(-1, keepdim=True)
    return with_grads(torch.einsum("bhst,bthd->bshd", weights.to(dtype), v), qkv, dout)


def assert_accurate(
    seqlen: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    reweight: Reweight | None,
) -> None:
    qkv = on_device(seqlen, heads, head_dim, dtype)
    dout = torch.randn_like(qkv[0])
    got = with_grads(lssar_attention(*qkv, reweight=reweight, impl="triton"), qkv, dout)
    truth = truth_of(qkv, dout, reweight=reweight)
    # In fp32 as for the tiled operator.
    noise = 1e-6 if dtype == FLOAT else 1e-7
    for a, e, r in zip(got, eager(qkv, dout, reweight), truth, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_eager(a, e, r, noise)


@pytest.mark.parametrize(
    ("reweight", "dtype"),
    covering(one([LSSA, SHARP, CUBE]), one([torch.float16, torch.bfloat16])),
)
def test_as_good_as_eager_in_half_precision(dtype: torch.dtype, reweight: Reweight | None) -> None:
    assert_accurate(100, (4, 2), 48, dtype, reweight)


# A ratio of errors says nothing of one token, whose dq and dk are 0: fp32 has that case.
@pytest.mark.parametrize(
    ("seqlen", "reweight"),
    tiered([(n, kind) for n in (63, 128, 257) for kind in (LSSA, SHARP)], {1, 2}),
)
def test_half_precision_at_any_length(seqlen: int, reweight: Reweight | None) -> None:
    assert_accurate(seqlen, (4, 1), 16, torch.float16, reweight)


@pytest.mark.parametrize("reweight", [LSSA, SHARP])
def test_any_strides_are_taken_and_nothing_outside_is_read(reweight: Reweight | None) -> None:
    # The public function makes directions of its own: here the operators are given the strides.
    q, k, v, dout = (x.detach() for x in (*on_device(40, (4, 2), 20, FLOAT), torch.empty(0)))
    dout = torch.randn_like(q)
    index = torch.arange(40)
    band = Band(index, 0 * index, index)

    def run(move: Any) -> list[Tensor]:
        three = [move(x) for x in (q, k, v)]
        done = TRITON_IMPL.whole(*three, band, reweight, True)
        one = move(done.out), None if done.slope is None else move(done.slope)
        saved = TRITON_IMPL.rows(move(dout), *one, done.mean, done.gamma, band, reweight)
        grads = TRITON_IMPL.bwd(move(dout), *three, band, saved, reweight)
        limits = Threshold(done.mean, torch.ones_like(done.gamma))
        sums = TRITON_IMPL.fwd(*three, band, limits, reweight, True)
        firsts = TRITON_IMPL.sums(*three[:2], band)
        return [done.out, *saved, *grads, *firsts, sums.out, sums.total, *(sums.slope or ())]

    truth = run(lambda x: x)
    for move in (in_nan, lambda x: x.transpose(1, 3).contiguous().transpose(1, 3)):
        for actual, reference in zip(run(move), truth, strict=True):
            assert torch.equal(actual, reference)
            assert torch.isfinite(actual).all()


@pytest.mark.parametrize(
    ("cut", "packed", "launch", "reweight"),
    tiered(
        [
            ("runs", False, SMALL[0], LSSA),
            ("runs", True, SMALL[1], SHARP),
            ("stripes", False, SMALL[1], CUBE),
            ("stripes", True, SMALL[2], LSSA),
            ("folded", True, SMALL[0], UNEVEN),
            ("folded", False, SMALL[2], SHARP),
            ("shuffled", True, SMALL[2], SHARP),
        ],
        {1, 3, 4, 6},
    ),
)
def test_blocks_are_those_of_the_tiled_operator(
    cut: str, packed: bool, launch: Launch, reweight: Reweight | None
) -> None:
    seqlen = 145
    q, k, v = (x.detach()[:1] for x in on_device(seqlen, (2, 1), 16, FLOAT))
    starts = tiled_starts(borders(seqlen) if packed else None, seqlen)
    counts = torch.arange(seqlen) - starts + 1
    q, k = directions(q, None, starts), directions(k, None, starts)
    q, dout = q * logit_scales(counts, None, q), torch.randn_like(q)
    q_idx, *others = cuts(seqlen, cut)[::-1]
    bands = [Band(q_idx, starts[q_idx], b) for b in (q_idx, *others)]
    mine, grad = q[:, q_idx], dout[:, q_idx]
    exact = [x.cpu().double() for x in (mine, grad)]
    limits = no_threshold(exact[0])
    if reweight is not None:
        firsts = [TRITON_IMPL.sums(mine, k[:, b.k_idx], b, launch=launch) for b in bands]
        truths = [BASE_2.sums(exact[0], k[:, b.k_idx].cpu().double(), b) for b in bands]
        for got, truth in zip(firsts, truths, strict=True):
            assert_close(list(got), list(truth))
        total, top = (torch.stack(x) for x in zip(*truths, strict=True))
        limits = row_threshold(
            total.sum(0), top.amax(0), mean_shares(counts[q_idx], reweight, total)
        )
    given = Threshold(*(x.float().to(HERE) for x in limits))
    whole = None
    for b in bands:
        at = b.k_idx
        got = TRITON_IMPL.fwd(mine, k[:, at], v[:, at], b, given, reweight, True, launch=launch)
        kv = [x[:, at].cpu().double() for x in (k, v)]
        truth = BASE_2.fwd(exact[0], *kv, b, limits, reweight, True)
        assert_close([*got[:2], *(got.slope or ())], [*truth[:2], *(truth.slope or ())])
        whole = truth if whole is None else whole.plus(truth)
    assert whole is not None
    done = lssar_finish(whole, limits, reweight)
    saved = BASE_2.rows(exact[1], *done, bands[0], reweight)
    on = [None if x is None else x.float().to(HERE) for x in done]
    rows = TRITON_IMPL.rows(grad, *on, bands[0], reweight)
    assert_close(list(rows), list(saved))
    for b in bands:
        kv = [x[:, b.k_idx] for x in (k, v)]
        got = TRITON_IMPL.bwd(grad, mine, *kv, b, rows, reweight, launches=(launch, launch))
        doubles = [x.cpu().double() for x in kv]
        truth = BASE_2.bwd(exact[1], exact[0], *doubles, b, saved, reweight)
        assert_close(list(got), list(truth))


@pytest.mark.parametrize(
    ("reweight", "launch"), covering(one([LSSA, SHARP, UNEVEN]), one(SMALL[1:]))
)
def test_both_sweeps_in_one_program_are_one_after_the_other(
    launch: Launch, reweight: Reweight | None
) -> None:
    q, k, v = (x.detach()[:1] for x in on_device(100, (2, 1), 16, FLOAT))
    starts = tiled_starts(borders(100), 100)
    index = torch.arange(100)
    band = Band(index, starts, index)
    q, k = directions(q, None, starts), directions(k, None, starts)
    q = q * logit_scales(band.counts, None, q)
    got = TRITON_IMPL.whole(q, k, v, band, reweight, True, launch=launch)
    truth = BASE_2.whole(*(x.cpu().double() for x in (q, k, v)), band, reweight, True)
    assert (got.slope is None) == (truth.slope is None) == (reweight is None)
    pairs = [pair for pair in zip(got, truth, strict=True) if pair[0] is not None]
    for actual, reference in pairs:
        assert actual is not None and reference is not None
        assert_matches(actual, reference, FP32)
    bare = TRITON_IMPL.whole(q, k, v, band, reweight, False, launch=launch)
    assert bare.slope is None and torch.equal(bare.out, got.out)


@pytest.mark.exhaustive
def test_sums_of_thousands_of_tiles_do_not_drift() -> None:
    """A row is flat where its greatest score is its mean: both must be right to a few ulps."""
    k = torch.ones(1, 16384, 1, 16, device=HERE) / 4
    q = 29.3 / 4 * torch.ones(1, 16, 1, 16, device=HERE)
    late = torch.arange(16384, 16400)
    band = Band(late, 0 * late, torch.arange(16384))
    total, top = TRITON_IMPL.sums(q, k, band, launch=Launch(16, 16, 4, 1))
    assert_matches(total.double().cpu() / 16384, top.double().cpu(), 2e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sums_keep_their_digits_at_any_score(dtype: torch.dtype) -> None:
    level = torch.tensor([-80.0, -20.0, -4.0, -1.0, 0.0, 3.0, 60.0, 1.0])
    q = (level[None, :, None, None] / 4).expand(1, 8, 1, 16)
    k = torch.full((1, 100, 1, 16), 0.25) + 0.02 * torch.randn(1, 100, 1, 16)
    q, k = q.to(HERE, dtype), k.to(HERE, dtype)
    band = Band(torch.arange(92, 100), torch.zeros(8, dtype=torch.int64), torch.arange(100))
    got = TRITON_IMPL.sums(q, k, band, launch=Launch(16, 64, 4, 1))
    truth = BASE_2.sums(q.cpu().double(), k.cpu().double(), band)
    # Of the polynomial, 8.5e-6 in half precision, and of the exponential of a rounded score.
    allowed = (2e-6 if dtype == FLOAT else 1e-5) + 2.5e-7 * level.abs().double()
    for actual, reference in zip(got, truth, strict=True):
        assert torch.all((actual.cpu().double() - reference).abs() <= allowed * reference)


def test_rows_that_see_nothing_and_blocks_of_other_lengths() -> None:
    q, k, v = (x.detach() for x in on_device(40, (2, 2), 16, FLOAT))
    early, late = torch.arange(40), torch.arange(30, 55)
    band, k, v = Band(early, torch.zeros_like(early), late), k[:, :25], v[:, :25]
    total, top = TRITON_IMPL.sums(q, k, band)
    assert torch.all(total[..., :30] == 0) and torch.all(top[..., :30] == 0)
    limits = Threshold(total / 10, torch.ones_like(total))
    for reweight in (LSSA, SHARP):
        sums = TRITON_IMPL.fwd(q, k, v, band, limits, reweight, True)
        for x in (sums.out.transpose(1, 2), sums.total, *(y for y in sums.slope or ())):
            rows = x.transpose(1, 2) if x.shape == sums.out.shape else x
            assert torch.all(rows[:, :, :30] == 0) and torch.isfinite(rows).all()
        done = TRITON_IMPL.whole(q, k, v, band, reweight, True)
        assert torch.all(done.out[:, :30] == 0) and torch.all(done.gamma[..., :30] == 0)
        saved = TRITON_IMPL.rows(torch.randn_like(q), *done, band, reweight)
        dq, dk, dv = TRITON_IMPL.bwd(torch.randn_like(q), q, k, v, band, saved, reweight)
        assert torch.all(dq[:, :30] == 0) and all(torch.isfinite(x).all() for x in (dq, dk, dv))
        assert torch.all(dk[:, 10:] == 0) and torch.all(dv[:, 10:] == 0)
        none = TRITON_IMPL.fwd(
            q, k[:, :0], v[:, :0], Band(*band[:2], late[:0]), limits, reweight, True
        )
        assert torch.all(none.out == 0) and torch.all(none.total == 0)


@pytest.mark.parametrize(
    ("dtype", "zero"),
    covering(one([torch.float32, torch.float16, torch.bfloat16]), one([False, True])),
)
def test_flat_rows_are_zero_and_do_no_harm(dtype: torch.dtype, zero: bool) -> None:
    qkv = [x.detach()[:1] for x in on_device(300, (2, 1), 16, dtype)]
    qkv[1] = qkv[1][:, :1].expand(1, 300, 1, 16).clone()
    qkv[0] = torch.zeros_like(qkv[0]) if zero else qkv[0]
    leaves = [x.requires_grad_() for x in qkv]
    out, *grads = with_grads(
        lssar_attention(*leaves, impl="triton"), leaves, torch.randn_like(leaves[0])
    )
    first = leaves[2][:, :1].repeat_interleave(2, 2)
    assert_matches(out[:, :1], first, 1e-6)
    assert torch.all(out[:, 3:] == 0) and torch.any(out[:, 1:3] != 0)
    assert all(torch.isfinite(x).all() for x in grads)
    assert torch.all(grads[2][:, 3:] == 0)


@pytest.mark.parametrize(
    ("dtype", "cosine"),
    covering(one([torch.float32, torch.float16, torch.bfloat16]), one([-0.5, 0.9])),
)
def test_one_match_and_nearly_flat_rows(cosine: float, dtype: torch.dtype) -> None:
    q, k, v = (x[:, -300:].to(HERE, dtype).requires_grad_() for x in one_match(cosine))
    got = with_grads(lssar_attention(q, k, v, impl="triton"), [q, k, v], torch.randn_like(v))
    assert_matches(got[0][0, -1], v[0, -1], torch.finfo(dtype).eps)
    assert all(torch.isfinite(x).all() for x in got)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_nearly_flat_rows_have_gradients_in_fp16() -> None:
    """There a score's gradient is beyond the range of fp16."""
    q, k, v = (x.detach()[:1] for x in on_device(65, (1, 1), 16, FLOAT))
    k = k[:, :1] + 3e-4 * torch.randn_like(k)
    index = torch.arange(65)
    band, dout = Band(index, 0 * index, index), 256 * torch.randn_like(q).half()
    q, k = directions(q, None, index), directions(k, None, index)
    three = [x.half() for x in (q * logit_scales(band.counts, LOG2E * math.log(16), q), k, v)]
    done = TRITON_IMPL.whole(*three, band, SHARP, True)
    assert done.slope is not None and done.gamma.max() > torch.finfo(torch.float16).max
    saved = TRITON_IMPL.rows(dout, *done, band, SHARP)
    grads = TRITON_IMPL.bwd(dout, *three, band, saved, SHARP)
    doubles = [x.cpu().double() for x in (*three, dout)]
    truth = BASE_2.whole(*doubles[:3], band, SHARP, True)
    saved = BASE_2.rows(doubles[3], *truth, band, SHARP)
    _, dk, dv = BASE_2.bwd(doubles[3], *doubles[:3], band, saved, SHARP)
    assert all(torch.isfinite(x).all() for x in (*done, *grads) if x is not None)
    # dq is their difference, which half precision has not.
    pairs = ((done.out, truth.out), (done.slope, truth.slope), (grads[1], dk), (grads[2], dv))
    for actual, reference in pairs:
        assert reference is not None
        assert_matches(actual, reference, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_very_small_scores_keep_their_weights(dtype: torch.dtype) -> None:
    """softplus(s) = e^s there: a logarithm of 1 + e^s would be 0."""
    q, k, v = (x.detach()[:1] for x in on_device(70, (2, 1), 16, dtype))
    k = k + 8 * torch.ones_like(k)
    q = q - 8 * torch.ones_like(q)
    qkv, scale = [x.requires_grad_() for x in (q, k, v)], 2.0 if dtype == torch.float16 else 5.0
    more = {"reweight": LSSA, "softmax_scale": scale}
    dout = torch.randn_like(q)
    got = with_grads(lssar_attention(*qkv, **more, impl="triton"), qkv, dout)
    truth = truth_of(qkv, dout, **more)
    for actual, reference in zip(got, truth, strict=True):
        assert_matches(actual, reference, FP32 if dtype == FLOAT else 0.1)


@pytest.mark.parametrize(
    ("kind", "cp_size", "packed", "options"),
    tiered(
        [
            ("contiguous", 2, True, LssarOptions()),
            ("contiguous", 3, False, LssarOptions(reweight=False)),
            ("zigzag", 2, False, LssarOptions(power=3.0)),
            ("zigzag", 3, True, LssarOptions()),
            ("striped", 2, False, LssarOptions()),
            ("striped", 3, True, LssarOptions(reweight=False)),
            ("striped", 3, False, LssarOptions(power=1.5, exempt_rows=0)),
        ],
        {0, 2, 5},
    ),
)
def test_a_ring_of_kernels_equals_one_of_torch(
    kind: str, cp_size: int, packed: bool, options: LssarOptions
) -> None:
    problem = make("lssar", kind, cp_size, packed=packed, at_least=48, dtype=FLOAT)
    problem = dataclasses.replace(problem, options=options)
    on_its_device(problem)
    got, sent = on_virtual_ranks(problem, "triton")
    expected, sent_by_torch = on_virtual_ranks(problem, "torch")
    assert_close(got, expected)
    # Kernels round otherwise than torch: it was they who ran.
    assert not torch.equal(got[0], expected[0])
    assert sent == sent_by_torch


def test_a_ring_in_half_precision_is_as_good_as_one_process() -> None:
    problem = make("lssar", "zigzag", 2, at_least=48, dtype=torch.float16)
    on_its_device(problem)
    got, _ = on_virtual_ranks(problem, "triton")
    leaves = [x.detach().requires_grad_() for x in problem.qkv]
    more = {"rotary": problem.keywords()["rotary"], "softmax_scale": problem.softmax_scale}
    alone = with_grads(lssar_attention(*leaves, **more, impl="triton"), leaves, problem.dout)
    truth = truth_of(leaves, problem.dout, **more)
    for a, e, r in zip(got, alone, truth, strict=True):
        assert a.dtype == torch.float16
        assert_as_good_as_eager(a, e, r)


def test_saves_directions_values_out_slope_and_scalars() -> None:
    q, k, v = on_device(128, (4, 1), 16, torch.float16)
    with saved_bytes() as saved:
        lssar_attention(q, k, v, rotary=Rotary(frequencies(16)), impl="triton")
    # Mean, gamma and the norm of each row, the norm of each key.
    scalars = 2 * 128 * (3 * 4 + 1)
    assert sum(saved.values()) == 2 * (3 * q.numel() + 2 * k.numel()) + 4 * scalars


def directions_by_torch(
    q: Tensor, k: Tensor, band: Band, rotary: Rotary | None, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the directions of float64 queries, times logit scales in base 2, and of keys."""
    q, k = directions(q, rotary, positions), directions(k, rotary, positions)
    return q * logit_scales(band.counts, -1.3 * LOG2E, q), k


@pytest.mark.parametrize(("head_dim", "turned"), covering(one([16, 18, 48]), one([True, False])))
def test_directions_are_those_of_torch(head_dim: int, turned: bool) -> None:
    q, k, _ = (x.detach() for x in on_device(37, (4, 2), head_dim, FLOAT))
    # |x|^2 below its bound, and 0, in rows that see others; a first row has the logit scale 0.
    q[:, 5:9] *= 1e-8
    k[:, 7:11] *= 1e-8
    q[:, 12], k[:, 13] = 0, 0
    starts = tiled_starts(borders(37), 37)
    band = Band(torch.arange(37), starts, torch.arange(37))
    rotary, places = Rotary(frequencies(head_dim), 1.1) if turned else None, band.q_idx
    for positions in (places, torch.randint(0, 500, (2, 37), device=HERE)):
        doubles = [x.cpu().double().requires_grad_() for x in (q, k)]
        truth = directions_by_torch(*doubles, band, rotary, positions.cpu())
        scales = kernel_logit_scales(band.counts, -1.3, q)
        tables = DirectionTables(scales, None if rotary is None else rotary.rotation(positions, q))
        made = directions_of(in_nan(q), in_nan(k), tables)
        assert_close(list(made[:2]), list(truth), 1e-6)
        grads = [torch.randn_like(x) for x in made[:2]]
        got = directions_bwd(*map(in_nan, grads), made, tables)
        expected = torch.autograd.grad(truth, doubles, [x.cpu().double() for x in grads])
        for actual, reference, x in zip(got, expected, doubles, strict=True):
            short = x.detach().norm(dim=-1, keepdim=True) < 1e-6
            for mask in (short, ~short):
                assert_matches(actual.cpu() * mask, reference * mask, 1e-5)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "says"),
    [
        (16, torch.float64, "bf16, fp16 and fp32, the tensors are torch.float64"),
        (14, torch.float32, "even head_dim from 16 to 256, not 14"),
        (258, torch.float32, "even head_dim from 16 to 256, not 258"),
    ],
)
def test_what_no_kernel_takes_is_refused(head_dim: int, dtype: torch.dtype, says: str) -> None:
    qkv = on_device(4, (2, 1), head_dim, dtype)
    band = Band(*(torch.arange(4),) * 3)
    with pytest.raises(ValueError, match=says):
        lssar_attention(*qkv, impl="triton")
    with pytest.raises(ValueError, match="use impl = 'auto' or 'torch'"):
        TRITON_IMPL.whole(*qkv, band, SHARP)
    with pytest.raises(ValueError, match="expected one floating dtype"):
        TRITON_IMPL.sums(qkv[0].bfloat16(), qkv[1].half(), band)


def test_a_cpu_without_the_interpreter_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = [x.detach().cpu() for x in on_device(4, (2, 1), 16, FLOAT)]
    monkeypatch.setattr(triton_common, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="'triton': kernels run on CUDA, the tensors are on cpu"):
        lssar_attention(*qkv, impl="triton")


def test_who_carries_it(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.zeros(1, 4, 2, 16)
    assert select_lssar_impl("triton", x.to(HERE), "test") is TRITON_IMPL
    assert select_lssar_impl("torch", x.to(HERE), "test") is TORCH_IMPL
    # Never interpreted unasked.
    with caplog.at_level("INFO", "lcdist_kernels"):
        for _ in range(2):
            assert select_lssar_impl("auto", x, "test of lssar") is TORCH_IMPL
    assert caplog.text.count("test of lssar: tiled torch, as kernels run on CUDA") == 1


LSSAR = """
import torch
from lcdist_kernels import Rotary
from lcdist_kernels.lssar import TRITON_IMPL, Band, Reweight
from lcdist_kernels.lssar.directions_kernel import DirectionTables, directions_bwd, directions_of
from tests.kernels.compiling import SHARED, compiled_for

index = torch.arange(300)
# A compilation takes seconds, so the capabilities take turns.
for head_dim, dtype, starts, reweight in (
    (80, torch.float16, 100 * (index // 100), Reweight(power=2.5)),
    (64, torch.bfloat16, 0 * index, None),
    (64, torch.float32, 0 * index, Reweight(power=1.0)),
)[CAPABILITY == 90 :: 2]:
    q, k = (torch.zeros(1, 300, n, head_dim, dtype=dtype) for n in (4, 2))
    band = Band(index, starts, index)
    rotation = Rotary(torch.ones(head_dim // 2)).rotation(index, q)
    with compiled_for(CAPABILITY) as made:
        done = TRITON_IMPL.whole(q, k, k, band, reweight, True)
        limits = done.mean, done.gamma
        TRITON_IMPL.fwd(q, k, k, band, limits, reweight, True)
        saved = TRITON_IMPL.rows(q, *done, band, reweight)
        TRITON_IMPL.bwd(q, q, k, k, band, saved, reweight)
        made_of = directions_of(q, k, DirectionTables(index.float(), rotation))
        directions_bwd(q.float(), k.float(), made_of, DirectionTables(index.float(), None))
    assert len(made) == 7 + (reweight is not None)
    for each in made:
        assert each.metadata.shared <= SHARED[CAPABILITY], each.metadata
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    compiles([LSSAR], capability, tmp_path)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reweight", [LSSA, SHARP])
def test_as_good_as_eager_on_a_gpu(
    dtype: torch.dtype, head_dim: int, reweight: Reweight | None
) -> None:
    assert_accurate(1000, (8, 2), head_dim, dtype, reweight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    qkv = on_device(3000, (8, 2), 64, dtype)
    dout = torch.randn_like(qkv[0])
    assert_same_bits(
        lambda: with_grads(
            lssar_attention(*qkv, cu_seqlens=borders(3000), impl="triton"), qkv, dout
        )
    )


@pytest.mark.gpu
def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    # The last row of the batch lies behind 2^31 elements of q, of k and v, of out, of e and dout.
    home = large_tensor()
    index = torch.arange(2048)
    band, k, v = Band(index, 0 * index, index), home[:, :, :2], home[:, :, 2:4]
    home[-1] /= home[-1].float().norm(dim=-1, keepdim=True).to(home.dtype)
    done = TRITON_IMPL.whole(home, k, v, band, SHARP, True)
    saved = TRITON_IMPL.rows(home, *done, band, SHARP)
    dq, dk, dv = TRITON_IMPL.bwd(home, home, k, v, band, saved, SHARP)
    q, k, v = home[-1:], k[-1:], v[-1:]
    alone = TRITON_IMPL.whole(q, k, v, band, SHARP, True)
    for actual, reference in zip(done, alone, strict=True):
        assert actual is not None and reference is not None
        assert torch.equal(actual[-1:], reference)
    saved = TRITON_IMPL.rows(q, *alone, band, SHARP)
    grads = TRITON_IMPL.bwd(q, q, k, v, band, saved, SHARP)
    for actual, reference in zip((dq, dk, dv), grads, strict=True):
        assert torch.equal(actual[-1:], reference)


@pytest.mark.gpu
def test_auto_on_a_gpu_makes_no_scores() -> None:
    qkv = [x.detach()[:1].requires_grad_() for x in on_device(20000, (2, 1), 64, torch.bfloat16)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lssar_attention(*qkv).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 20000 * 20000

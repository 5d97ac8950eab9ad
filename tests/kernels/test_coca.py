"""CoCA's operators: the reference by the paper's definition, the transform, the tiled operator."""

import math

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary, coca_attention, coca_reference
from lcdist_kernels.coca import (
    VARIANTS,
    coca_keys,
    coca_queries,
    collinear,
    keys,
    queries,
    rotary_angles,
)
from tests.kernels.helpers import rotated_and_packed
from tests.kernels.test_full import DOUBLE, HEADS, borders, inputs, with_grads
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager, assert_matches, relative_error

LENGTHS = [1, 63, 100, 257]
# Kernels do not take float64: see test_coca_triton.
IMPLS = ("auto", "torch", "reference")
# Of the specification: 6 tokens, 1 head of 4, base 10000; o[5], dq[5], dt[1], dv[1].
GOLDEN = {
    "slack": [
        (0.705646, 0.175800, 0.199444, 0.018266),
        (-0.021626, 0.161571, -0.084925, -0.154449),
        (0.235676, -0.316487, 0.235676, -0.316487),
        (0.682244, -0.013006, -0.703713, -1.148593),
    ],
    "strict": [
        (0.705257, 0.171691, 0.196629, 0.016615),
        (-0.069838, 0.160447, -0.013113, -0.153188),
        (0.074417, -0.329282, 0.074417, -0.329282),
        (0.853261, 0.052368, -0.766819, -1.318135),
    ],
}


def golden_inputs() -> tuple[list[Tensor], Tensor]:
    i, j = torch.arange(6, dtype=DOUBLE)[:, None], torch.arange(4, dtype=DOUBLE)
    q, t = (0.7 * i + 1.3 * j + 0.1).sin(), (0.9 * i - 0.8 * j + 0.2).cos()
    v, dout = (0.5 * i * (j + 1) + 0.3).sin(), (0.4 * i + 0.6 * j).cos()
    qtv = [x[None, :, None].requires_grad_() for x in (q, t, v)]
    return qtv, dout[None, :, None]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_golden_values(variant: str, impl: str) -> None:
    qtv, dout = golden_inputs()
    out = coca_attention(*qtv, variant=variant, rotary=Rotary(frequencies(4)), impl=impl)
    tensors = with_grads(out, qtv, dout)
    for tensor, row, values in zip(tensors, (5, 5, 1, 1), GOLDEN[variant], strict=True):
        expected = torch.tensor(values, dtype=DOUBLE)
        assert (tensor[0, row, 0] - expected).abs().max() <= 6e-7


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate with complex numbers: pair l is the number x[l] + i x[l + half]."""
    a, b = x.chunk(2, -1)
    y = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((y.real, y.imag), -1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_is_the_papers_definition(variant: str) -> None:
    # One key a query, made of both: eq. 9 for strict, eq. 10 for slack.
    seqlen, half, start = 9, 3, 40
    q, t, v = (torch.randn(1, seqlen, 1, 2 * half, dtype=DOUBLE) for _ in range(3))
    theta = torch.rand(half, dtype=DOUBLE)
    expected = torch.zeros(seqlen, 2 * half, dtype=DOUBLE)
    for m in range(seqlen):
        scores = []
        for n in range(m + 1):
            tau = ((t[0, n, 0, :half] + t[0, n, 0, half:]) / 2).clamp(min=0).repeat(2)
            q_m, at_n = q[0, m, 0], theta * (start + n)
            key = turn(q_m * tau, at_n) if variant == "strict" else q_m * turn(tau, at_n)
            scores.append(turn(q_m, theta * (start + m)) @ key)
        weights = (torch.stack(scores) / math.sqrt(2 * half)).softmax(0)
        expected[m] = weights @ v[0, : m + 1, 0]
    positions = torch.arange(start, start + seqlen)
    out = coca_reference(q, t, v, variant=variant, rotary=Rotary(theta), positions=positions)
    assert_matches(out[0, :, 0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_strict_knows_distances_alone_and_slack_more(variant: str) -> None:
    qtv = inputs(64)
    positions = torch.arange(64)
    asked = {"variant": variant, "rotary": Rotary(frequencies(16))}
    for impl in IMPLS:
        here = coca_attention(*qtv, **asked, positions=positions, impl=impl)
        there = coca_attention(*qtv, **asked, positions=positions + 1000, impl=impl)
        error = relative_error(there, here)
        assert error < 1e-10 if variant == "strict" else error > 0.01


def test_the_two_agree_where_the_halves_of_q_are_equal() -> None:
    # Theorem 1: the constraint that strict puts on q is a = b; then |q|^2 = 2 a^2.
    q, t, v = inputs(30)
    q = q[..., :8].repeat(1, 1, 1, 2)
    asked = {"rotary": Rotary(frequencies(16))}
    slack, strict = (coca_reference(q, t, v, **asked, variant=name) for name in VARIANTS)
    assert_matches(slack, strict)


@pytest.mark.parametrize(
    ("seqlen", "variant", "impl", "packed", "heads"),
    covering(
        one(LENGTHS),
        one(VARIANTS),
        [("torch", False), ("torch", True), ("auto", False)],
        one(HEADS),
        free=2,
    ),
)
def test_equals_reference(
    variant: str, seqlen: int, heads: tuple[int, int], packed: bool, impl: str
) -> None:
    qtv = inputs(seqlen, heads)
    dout = torch.randn_like(qtv[0])
    more = {"variant": variant, **rotated_and_packed(seqlen, 16, packed)}
    truth = with_grads(coca_reference(*qtv, **more), qtv, dout)
    got = with_grads(coca_attention(*qtv, **more, impl=impl), qtv, dout)
    for actual, reference in zip(got, truth, strict=True):
        assert_matches(actual, reference)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_of_rows_no_rotation_and_a_scale(variant: str, impl: str) -> None:
    qtv = inputs(20)
    dout = torch.randn_like(qtv[0])
    for rotary, positions in (
        (Rotary(frequencies(16)), torch.randint(0, 500, (2, 20))),
        (None, torch.arange(20)),
    ):
        at = {"rotary": rotary, "positions": positions, "variant": variant}
        truth = with_grads(coca_reference(*qtv, **at, softmax_scale=0.7), qtv, dout)
        got = with_grads(coca_attention(*qtv, **at, softmax_scale=0.7, impl=impl), qtv, dout)
        for actual, reference in zip(got, truth, strict=True):
            assert_matches(actual, reference)
        assert relative_error(coca_attention(*qtv, **at, impl=impl), got[0]) > 1e-3


def test_without_rotation_both_variants_read_content_alone() -> None:
    # theta = 0: sum of tau |q|^2 over the pairs, in either.
    qtv = inputs(20)
    slack, strict = (coca_reference(*qtv, variant=name) for name in VARIANTS)
    assert_matches(slack, strict)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_are_as_alone(variant: str, impl: str) -> None:
    # Slack would see a document's place in the sequence if its positions did not restart.
    qtv = inputs(100)
    asked = {"variant": variant, "rotary": Rotary(frequencies(16))}
    out = coca_attention(*qtv, **asked, cu_seqlens=borders(100), impl=impl)
    starts = [*borders(100).tolist(), 100]
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        if start < stop:
            part = [x[:, start:stop] for x in qtv]
            assert_matches(out[:, start:stop], coca_reference(*part, **asked))


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_a_dead_coefficient_passes_no_gradient(impl: str) -> None:
    q, t, v = inputs(12, (2, 1))
    with torch.no_grad():
        t[:, :, :, 0], t[:, :, :, 8] = 1.0, -1.5
        t[:, :, :, 1], t[:, :, :, 9] = 1.0, -1.0
        t[:, :, :, 2], t[:, :, :, 10] = -1.0, 1.5
    out = coca_attention(q, t, v, rotary=Rotary(frequencies(16)), impl=impl)
    (dt,) = torch.autograd.grad(out, t, torch.randn_like(out))
    assert torch.all(dt[..., [0, 1, 8, 9]] == 0) and torch.all(dt[..., [2, 10]].abs().sum(1) > 0)
    assert torch.equal(dt[..., :8], dt[..., 8:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("impl", "packed"), [("torch", False), ("torch", True), ("auto", False)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_as_good_as_eager_in_low_precision(
    variant: str, impl: str, packed: bool, dtype: torch.dtype
) -> None:
    qtv = inputs(257, dtype=dtype)
    dout = torch.randn_like(qtv[0])
    starts = 100 * (torch.arange(257) >= 100) if packed else torch.zeros(257, dtype=torch.int64)
    cu_seqlens = torch.tensor([0, 100], dtype=torch.int32) if packed else None
    asked = {"variant": variant, "cu_seqlens": cu_seqlens}
    wide = [x.detach().double().requires_grad_() for x in qtv]
    truth = with_grads(
        coca_reference(*wide, rotary=Rotary(frequencies(16)), **asked), wide, dout.double()
    )

    rotary, positions = Rotary(frequencies(16)), torch.arange(257) - starts
    half = qtv[1].chunk(2, -1)
    tau = ((half[0] + half[1]) / 2).relu()
    q, zero = qtv[0], torch.zeros_like(tau)
    if variant == "slack":
        factor = q * rotary.rotate(q, positions)
        key = rotary.rotate(torch.cat((tau, tau), -1), positions)
    else:
        square = q.square()[..., :8] + q.square()[..., 8:]
        factor = rotary.rotate(torch.cat((square, torch.zeros_like(square)), -1), positions)
        key = rotary.rotate(torch.cat((tau, zero), -1), positions)
    key, v = (x.repeat_interleave(2, 2) for x in (key, qtv[2]))
    mask = torch.ones(257, 257, dtype=torch.bool).tril() & (starts[:, None] == starts)
    scores = torch.einsum("bshd,bthd->bhst", factor, key) * 16**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    eager = with_grads(torch.einsum("bhst,bthd->bshd", weights, v), qtv, dout)

    got = with_grads(
        coca_attention(*qtv, rotary=Rotary(frequencies(16)), **asked, impl=impl), qtv, dout
    )
    for actual, plain, reference in zip(got, eager, truth, strict=True):
        assert actual.dtype == dtype
        assert_as_good_as_eager(actual, plain, reference)


@pytest.mark.parametrize("variant", VARIANTS)
def test_factors_of_half_precision_are_products_in_single(variant: str) -> None:
    q, t, _ = (x.detach() for x in inputs(8, dtype=torch.bfloat16))
    rotary, index = Rotary(frequencies(16)), torch.arange(8)
    at, tau = rotary_angles(rotary, index, q, 16), collinear(t)
    for made, truth in (
        (queries(q, at, variant), coca_queries(q.double(), rotary, index, variant)),
        (coca_queries(q, rotary, index, variant), coca_queries(q.double(), rotary, index, variant)),
        (keys(tau, at, variant), coca_keys(tau.double(), rotary, index, variant)),
        (coca_keys(tau, rotary, index, variant), coca_keys(tau.double(), rotary, index, variant)),
    ):
        assert made.dtype == torch.float32
        assert_matches(made, truth, 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_saves_q_tau_v_out_and_lse_alone(variant: str) -> None:
    q, t, v = inputs(512, (4, 1), dtype=torch.float32)
    with saved_bytes() as saved:
        coca_attention(q, t, v, variant=variant, rotary=Rotary(frequencies(16)), impl="torch")
    elements = 2 * q.numel() + t.numel() // 2 + v.numel() + 2 * 512 * 4
    assert sum(saved.values()) <= 4 * elements + 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"t": torch.ones(2, 8, 3, 16)}, "of one shape"),
        ({"q": torch.ones(2, 7, 4, 16)}, "q has 7 tokens"),
        ({"q": torch.ones(2, 8, 4, 16).double()}, "one floating dtype"),
        ({"impl": "cuda"}, "coca attention has auto, cudnn, fa3, fa4, triton, torch, reference"),
        ({"variant": "tied"}, "'tied': must be one of slack, strict"),
        ({"rotary": Rotary(frequencies(8))}, "4 frequencies"),
        ({"cu_seqlens": torch.tensor([0, 9], dtype=torch.int32)}, r"\[0, 9\].*seqlen = 8"),
        ({n: torch.ones(2, 8, 4, 15) for n in "qtv"}, "head_dim = 15.*even"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, says: str) -> None:
    call = {name: torch.ones(2, 8, n, 16) for name, n in zip("qtv", (4, 2, 2), strict=True)}
    for impl in IMPLS:
        with pytest.raises(ValueError, match=says):
            coca_attention(**({"impl": impl} | call | change))

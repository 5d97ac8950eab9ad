"""CoCA by full attention's kernels: against the dense reference, on a ring, and refused.

Without a GPU they run in Triton's interpreter; tests marked `gpu` need one.
"""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from lcdist.config.schema import CocaOptions
from lcdist_kernels import Rotary, coca_attention, coca_reference
from lcdist_kernels.coca import (
    TORCH_IMPL,
    TRITON_IMPL,
    VARIANTS,
    coca_tau,
    rotary_angles,
    select_coca_impl,
)
from tests.attention.body import make, on_virtual_ranks
from tests.kernels.helpers import (
    HERE,
    REFUSED,
    assert_close,
    assert_kernels_are_right,
    assert_ranks_of_kernels_are_right,
    assert_refused,
    first_row,
    in_nan,
    on_device,
    on_its_device,
    rotated_and_packed,
    truth_by,
)
from tests.kernels.repeat import assert_right_behind_2_to_the_31, assert_same_bits
from tests.kernels.test_full import with_grads
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one, tiered
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager

SHAPES = [(n, (2, 1), 16) for n in (1, 63, 100, 257)]
SHAPES += [(70, heads, 16) for heads in ((8, 8), (8, 4), (8, 1))]
SHAPES += [(70, (2, 1), 48)]


truth_of = truth_by(coca_reference)


@pytest.mark.parametrize(
    ("seqlen", "heads", "head_dim", "variant", "packed"),
    tiered(
        [
            (*shape, kind, packed)
            for shape in SHAPES
            for kind in VARIANTS
            for packed in (False, True)
        ],
        {1, 6, 8, 11, 15, 18, 21, 24, 28, 31},
    ),
)
def test_equals_reference(
    seqlen: int, heads: tuple[int, int], head_dim: int, variant: str, packed: bool
) -> None:
    qtv = first_row(seqlen, heads, head_dim)
    more = {"variant": variant, **rotated_and_packed(seqlen, head_dim, packed)}
    assert_kernels_are_right(coca_attention, truth_of, qtv, **more)


def eager(qtv: list[Tensor], dout: Tensor, variant: str, rotary: Rotary) -> list[Tensor]:
    """RingKernel and scores in the inputs' own dtype."""
    q, t, v = qtv
    index, group = torch.arange(q.shape[1]), q.shape[2] // v.shape[2]
    tau = coca_tau(t)
    if variant == "slack":
        factor = q * rotary.rotate(q, index)
        key = rotary.rotate(torch.cat((tau, tau), -1), index)
    else:
        first, second = q.chunk(2, -1)
        square = first.square() + second.square()
        factor = rotary.rotate(torch.cat((square, torch.zeros_like(square)), -1), index)
        key = rotary.rotate(torch.cat((tau, torch.zeros_like(tau)), -1), index)
    key, v = (x.repeat_interleave(group, 2) for x in (key, v))
    mask = torch.ones(len(index), len(index), dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("bshd,bthd->bhst", factor, key) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return with_grads(torch.einsum("bhst,bthd->bshd", weights, v), qtv, dout)


def assert_accurate(
    seqlen: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, variant: str
) -> None:
    qtv, rotary = on_device(seqlen, heads, head_dim, dtype), Rotary(frequencies(head_dim))
    dout = torch.randn_like(qtv[0])
    more = {"variant": variant, "rotary": rotary}
    got = with_grads(coca_attention(*qtv, **more, impl="triton"), qtv, dout)
    plain, truth = eager(qtv, dout, variant, rotary), truth_of(qtv, dout, **more)
    for a, e, r in zip(got, plain, truth, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_eager(a, e, r)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_good_as_eager_in_half_precision(dtype: torch.dtype, variant: str) -> None:
    assert_accurate(100, (4, 2), 48, dtype, variant)


# A ratio of errors says nothing of one token, whose dq and dk are 0: fp32 has that case.
@pytest.mark.parametrize("seqlen", tiered(one([63, 128, 257]), {0}))
def test_half_precision_at_any_length(seqlen: int) -> None:
    assert_accurate(seqlen, (4, 1), 16, torch.float16, "slack")


def test_any_strides_are_taken_and_nothing_outside_is_read() -> None:
    plain = on_device(70, (4, 2), 20, torch.float32)
    dout, rotary = torch.randn_like(plain[0]), Rotary(frequencies(20))
    truth = with_grads(coca_attention(*plain, rotary=rotary, impl="triton"), plain, dout)
    strided = [in_nan(x.detach()).requires_grad_() for x in plain]
    out = coca_attention(*strided, rotary=rotary, impl="triton")
    for actual, reference in zip(with_grads(out, strided, in_nan(dout)), truth, strict=True):
        assert torch.equal(actual, reference)


@pytest.mark.parametrize(
    ("kind", "cp_size", "packed", "variant"),
    covering([("zigzag", 2, True), ("contiguous", 2, False), ("striped", 3, True)], one(VARIANTS)),
)
def test_a_ring_of_kernels_equals_one_of_torch(
    kind: str, cp_size: int, packed: bool, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make("coca", kind, cp_size, packed=packed, at_least=48, dtype=torch.float32)
    problem = dataclasses.replace(problem, options=CocaOptions(variant=variant))  # pyright: ignore[reportArgumentType]
    assert_ranks_of_kernels_are_right(problem, monkeypatch)


@pytest.mark.parametrize("cp_size", [1, 2])
def test_a_ring_in_half_precision_is_as_good_as_torch(cp_size: int) -> None:
    problem = make("coca", "zigzag", cp_size, at_least=48, dtype=torch.float16)
    on_its_device(problem)
    got = on_virtual_ranks(problem, "triton")[0]
    assert all(x.dtype == torch.float16 for x in got)
    # q' and k' are rounded to half, and what is multiplied with it is too.
    assert_close(got, on_virtual_ranks(problem, "torch")[0], 2e-3)


def test_saves_q_tau_v_out_and_lse_alone() -> None:
    q, t, v = on_device(128, (4, 1), 16, torch.float16)
    with saved_bytes() as saved:
        coca_attention(q, t, v, rotary=Rotary(frequencies(16)), impl="triton")
    halves = 2 * q.numel() + t.numel() // 2 + v.numel()
    assert sum(saved.values()) == 2 * halves + 4 * (2 * 128 * 4)


@pytest.mark.parametrize(("head_dim", "dtype", "says"), REFUSED)
def test_what_no_kernel_takes_is_refused(head_dim: int, dtype: torch.dtype, says: str) -> None:
    assert_refused("coca", partial(coca_attention, impl="triton"), head_dim, dtype, says)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [16, 18, 48])
def test_maps_are_those_of_torch(head_dim: int, variant: str) -> None:
    rotary, half = Rotary(frequencies(head_dim), 1.1), head_dim // 2
    q, g, _ = (x.detach() for x in on_device(37, (4, 4), head_dim, torch.float32))
    g = in_nan(g)
    tau = g[..., half:].relu()[:, ::2]
    for positions in (torch.arange(37), torch.randint(0, 500, (2, 37))):
        at, of_tau = (
            rotary_angles(rotary, p, q, head_dim)
            for p in (positions, positions[..., ::2].contiguous())
        )
        few, two = in_nan(q[:, ::2]), in_nan(q[:, ::2, 2:])
        for name, *given in (
            ("queries", q, at),
            ("queries_bwd", g, q, at),
            ("keys", tau, of_tau),
            ("keys_bwd", g, at),
            ("factors", few, two, of_tau),
            ("factors_of_tau", few, tau, of_tau),
            ("factors_bwd", g[:, ::2, :2], few, two, tau, of_tau),
        ):
            exact = [x.double() if isinstance(x, Tensor) else x for x in given]
            got, truth = (
                getattr(impl, name)(*words, variant)
                for impl, words in ((TRITON_IMPL, given), (TORCH_IMPL, exact))
            )
            lists = ([x] if isinstance(x, Tensor) else list(x) for x in (got, truth))
            assert_close(*lists, 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_keys_are_made_again_as_they_were(variant: str) -> None:
    q, t, _ = (x.detach() for x in on_device(37, (4, 2), 16, torch.float16))
    at = rotary_angles(Rotary(frequencies(16)), torch.arange(37), q, 16)
    *made, tau = TRITON_IMPL.factors(q, t, at, variant)
    assert tau.dtype == torch.float16
    again = TRITON_IMPL.factors_of_tau(q, tau, at, variant)
    alone = TRITON_IMPL.queries(q, at, variant), TRITON_IMPL.keys(tau, at, variant)
    for x, y, z in zip(made, again, alone, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


def test_who_carries_it() -> None:
    q = torch.zeros(1, 4, 2, 16, device=HERE)
    assert select_coca_impl("triton", q, "test") == TRITON_IMPL
    assert select_coca_impl("torch", q, "test") is TORCH_IMPL
    # Never interpreted unasked.
    assert select_coca_impl("auto", q, "test") == (TRITON_IMPL if q.is_cuda else TORCH_IMPL)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_good_as_eager_on_a_gpu(dtype: torch.dtype, head_dim: int, variant: str) -> None:
    assert_accurate(1000, (8, 2), head_dim, dtype, variant)


@pytest.mark.gpu
def test_the_same_bits_twice() -> None:
    qtv = on_device(3000, (8, 2), 64, torch.bfloat16)
    dout, rotary = torch.randn_like(qtv[0]), Rotary(frequencies(64))
    assert_same_bits(
        lambda: with_grads(coca_attention(*qtv, rotary=rotary, impl="triton"), qtv, dout)
    )


@pytest.mark.gpu
def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    more = {"rotary": Rotary(frequencies(256)), "impl": "triton"}
    assert_right_behind_2_to_the_31(
        lambda qtv, dout: with_grads(coca_attention(*qtv, **more), qtv, dout)
    )

"""Full attention's kernels: against the dense reference, block by block, on a ring, and refused.

Without a GPU they run in Triton's interpreter; tests marked `gpu` need one.
"""

import pytest
import torch
from torch import Tensor

from lcdist_kernels import full_attention, full_reference, triton_common
from lcdist_kernels.full import (
    TORCH_IMPL,
    TRITON_IMPL,
    full_partial,
    merge,
    select_impl,
    visible,
)
from lcdist_kernels.triton_common import Launch
from tests.attention.body import make, on_virtual_ranks
from tests.kernels.helpers import (
    FP32,
    HERE,
    SHAPES,
    SMALL,
    assert_close,
    assert_close_partial,
    assert_kernels_are_right,
    in_nan,
    on_device,
    on_its_device,
    rotated_and_packed,
    truth_by,
)
from tests.kernels.repeat import assert_right_behind_2_to_the_31, assert_same_bits
from tests.kernels.test_full import borders, inputs, tiled_starts, with_grads
from tests.kernels.tiers import one, tiered
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager

truth_of = truth_by(full_reference)


PACKED_SHAPES = [(packed, *shape) for shape in SHAPES for packed in (False, True)]


@pytest.mark.parametrize(
    ("packed", "seqlen", "heads", "head_dim"),
    tiered(PACKED_SHAPES, {1, 2, 5, 6, 9, 11, 12, 15, 17, 20}),
)
def test_equals_reference(seqlen: int, heads: tuple[int, int], head_dim: int, packed: bool) -> None:
    qkv = on_device(seqlen, heads, head_dim, torch.float32)
    more = rotated_and_packed(seqlen, head_dim, packed)
    assert_kernels_are_right(full_attention, truth_of, qkv, **more)


def eager(qkv: list[Tensor], dout: Tensor) -> list[Tensor]:
    seqlen, head_dim = qkv[0].shape[1], qkv[0].shape[3]
    mask = torch.ones(seqlen, seqlen, dtype=torch.bool, device=dout.device).tril()
    k, v = (x.repeat_interleave(qkv[0].shape[2] // x.shape[2], 2) for x in qkv[1:])
    scores = torch.einsum("bshd,bthd->bhst", qkv[0], k) * head_dim**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return with_grads(torch.einsum("bhst,bthd->bshd", weights, v), qkv, dout)


def assert_accurate(seqlen: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    qkv = on_device(seqlen, heads, head_dim, dtype)
    dout = torch.randn_like(qkv[0])
    got = with_grads(full_attention(*qkv, impl="triton"), qkv, dout)
    for a, e, r in zip(got, eager(qkv, dout), truth_of(qkv, dout), strict=True):
        assert a.dtype == dtype
        assert_as_good_as_eager(a, e, r)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_as_good_as_eager_in_half_precision(dtype: torch.dtype) -> None:
    assert_accurate(100, (4, 2), 48, dtype)


# A ratio of errors says nothing of one token, whose dq and dk are 0: fp32 has that case.
@pytest.mark.parametrize("seqlen", tiered(one([63, 128, 257]), {0}))
def test_half_precision_at_any_length(seqlen: int) -> None:
    assert_accurate(seqlen, (4, 1), 16, torch.float16)


def test_any_strides_are_taken_and_nothing_outside_is_read() -> None:
    plain = [x.detach() for x in on_device(70, (4, 2), 20, torch.float32)]
    dout = torch.randn_like(plain[0])
    qkv = [x.requires_grad_() for x in plain]
    truth = with_grads(full_attention(*qkv, impl="triton"), qkv, dout)
    strided = [in_nan(x.detach()).requires_grad_() for x in plain]
    got = with_grads(full_attention(*strided, impl="triton"), strided, in_nan(dout))
    for actual, reference in zip(got, truth, strict=True):
        assert torch.equal(actual, reference)
    # Features apart: the last dimension is not contiguous, and a sum's gradient has no strides.
    apart = [
        x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in plain
    ]
    out = full_attention(*apart, impl="triton")
    assert torch.equal(out, truth[0])
    ones = with_grads(full_attention(*qkv, impl="triton"), qkv, torch.ones_like(dout))
    for actual, reference in zip(torch.autograd.grad(out.sum(), apart), ones[1:], strict=True):
        assert torch.equal(actual, reference)


def cuts(seqlen: int, cut: str) -> list[Tensor]:
    order = torch.arange(seqlen)
    if cut == "stripes":
        return [order[i::3] for i in range(3)]
    if cut == "folded":
        pieces = order.chunk(6)
        return [torch.cat((pieces[i], pieces[5 - i])) for i in range(3)]
    if cut == "shuffled":
        return list(torch.randperm(seqlen).chunk(3))
    return list(order.chunk(3))


@pytest.mark.parametrize(
    ("cut", "packed", "launch"),
    tiered(
        [
            ("runs", False, SMALL[0]),
            ("runs", True, SMALL[1]),
            ("stripes", False, SMALL[1]),
            ("stripes", True, SMALL[2]),
            ("folded", True, SMALL[0]),
            ("folded", False, SMALL[2]),
            ("shuffled", True, SMALL[2]),
        ],
        {1, 2, 4, 6},
    ),
)
def test_blocks_are_those_of_the_tiled_operator(cut: str, packed: bool, launch: Launch) -> None:
    seqlen = 145
    q, k, v = (x.detach() for x in on_device(seqlen, (2, 1), 16, torch.float32))
    dout = torch.randn_like(q)
    starts = tiled_starts(borders(seqlen) if packed else None, seqlen)
    q_idx, *others = cuts(seqlen, cut)[::-1]
    band, mine, grad = (q_idx, starts[q_idx]), q[:, q_idx], dout[:, q_idx]
    whole: tuple[Tensor, Tensor] | None = None
    for b in (q_idx, *others):
        out, lse = TRITON_IMPL.fwd(mine, k[:, b], v[:, b], *band, b, 0.25, launch=launch)
        doubles = [x.cpu().double() for x in (mine, k[:, b], v[:, b])]
        dense = full_partial(*doubles, visible(*band, b), 0.25)
        assert_close_partial(out, lse, dense)
        whole = (out, lse) if whole is None else merge(*whole, out, lse)
    assert whole is not None
    # dq is that of all blocks so far.
    dq, true_dq = None, None
    for b in (q_idx, *others):
        one = (grad, mine, k[:, b], v[:, b], *whole)
        got = TRITON_IMPL.bwd(*one, *band, b, 0.25, dq_sum=dq, launches=(launch, launch))
        doubles = [x.cpu().double() for x in one]
        truth = TORCH_IMPL.bwd(*doubles, *band, b, 0.25, dq_sum=true_dq)
        assert_close(list(got), list(truth))
        assert dq is None or (got[0] is dq and truth[0] is true_dq)
        dq, true_dq = in_nan(got[0]), truth[0]


def test_rows_that_see_nothing_and_blocks_of_other_lengths() -> None:
    q, k, v = (x.detach() for x in on_device(40, (2, 2), 16, torch.float32))
    early, late = torch.arange(40), torch.arange(30, 55)
    band = (early, torch.zeros_like(early), late)
    out, lse = TRITON_IMPL.fwd(q, k[:, :25], v[:, :25], *band, 0.25)
    assert torch.all(lse[..., :30] == -torch.inf) and torch.all(out[:, :30] == 0)
    assert torch.isfinite(lse[..., 30:]).all() and torch.isfinite(out).all()
    # Their lse of the whole row may be -inf too: their share of every gradient is zero.
    dq, dk, dv = TRITON_IMPL.bwd(
        torch.randn_like(q), q, k[:, :25], v[:, :25], out, lse, *band, 0.25
    )
    assert torch.all(dq[:, :30] == 0) and all(torch.isfinite(x).all() for x in (dq, dk, dv))
    assert torch.all(dk[:, 10:] == 0) and torch.all(dv[:, 10:] == 0)
    nothing = TRITON_IMPL.fwd(q, k[:, :0], v[:, :0], *band[:2], late[:0], 0.25)
    assert torch.all(nothing[0] == 0) and torch.all(nothing[1] == -torch.inf)


@pytest.mark.parametrize("scale", tiered(one([300.0, -300.0, -0.5, 0.0]), {0, 2}))
def test_any_scale(scale: float) -> None:
    qkv = on_device(70, (2, 1), 16, torch.float32)
    dout = torch.randn_like(qkv[0])
    got = with_grads(full_attention(*qkv, softmax_scale=scale, impl="triton"), qkv, dout)
    truth = truth_of(qkv, dout, softmax_scale=scale)
    # At 300 nearly all weight is on one key, and a score's fp32 rounding is worth 1e-4.
    assert_close(got[:1], truth[:1], 1e-3 if abs(scale) > 1 else FP32)
    if abs(scale) < 1:
        assert_close(got, truth)
    assert all(torch.isfinite(x).all() for x in got)


@pytest.mark.parametrize(
    ("kind", "cp_size", "packed"),
    tiered(
        [
            ("contiguous", 2, True),
            ("contiguous", 4, False),
            ("zigzag", 3, False),
            ("zigzag", 4, True),
            ("striped", 2, False),
            ("striped", 3, True),
        ],
        {0, 2, 5},
    ),
)
def test_a_ring_of_kernels_equals_one_of_torch(kind: str, cp_size: int, packed: bool) -> None:
    problem = make("full", kind, cp_size, packed=packed, at_least=48, dtype=torch.float32)
    on_its_device(problem)
    got, sent = on_virtual_ranks(problem, "triton")
    expected, sent_by_torch = on_virtual_ranks(problem, "torch")
    assert_close(got, expected)
    assert sent == sent_by_torch


def test_saves_inputs_out_and_lse_alone() -> None:
    q, k, v = on_device(128, (4, 1), 16, torch.float16)
    with saved_bytes() as saved:
        full_attention(q, k, v, impl="triton")
    assert sum(saved.values()) == 2 * (2 * q.numel() + 2 * k.numel()) + 4 * (2 * 128 * 4)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "says"),
    [
        (16, torch.float64, "bf16, fp16 and fp32, the tensors are torch.float64"),
        (14, torch.float32, "even head_dim from 16 to 256, not 14"),
        (17, torch.float32, "even head_dim from 16 to 256, not 17"),
        (258, torch.float32, "even head_dim from 16 to 256, not 258"),
    ],
)
def test_what_no_kernel_takes_is_refused(head_dim: int, dtype: torch.dtype, says: str) -> None:
    qkv = on_device(4, (2, 1), head_dim, dtype)
    with pytest.raises(ValueError, match=says):
        full_attention(*qkv, impl="triton")
    with pytest.raises(ValueError, match="use impl = 'auto' or 'torch'"):
        TRITON_IMPL.fwd(*qkv, *(torch.arange(4),) * 3, 0.25)


def test_a_cpu_without_the_interpreter_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = inputs(4, dtype=torch.float32)
    monkeypatch.setattr(triton_common, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="'triton': kernels run on CUDA, the tensors are on cpu"):
        full_attention(*qkv, impl="triton")


def test_who_carries_it() -> None:
    x = inputs(4, dtype=torch.float32)[0].to(HERE)
    assert select_impl("triton", x, "test") is TRITON_IMPL
    assert select_impl("torch", x, "test") is TORCH_IMPL
    # Never interpreted unasked.
    assert select_impl("auto", x, "test") is (TRITON_IMPL if x.is_cuda else TORCH_IMPL)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_good_as_eager_on_a_gpu(dtype: torch.dtype, head_dim: int) -> None:
    assert_accurate(1000, (8, 2), head_dim, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_twice(dtype: torch.dtype) -> None:
    qkv = on_device(3000, (8, 2), 64, dtype)
    dout = torch.randn_like(qkv[0])
    assert_same_bits(
        lambda: with_grads(full_attention(*qkv, cu_seqlens=borders(3000), impl="triton"), qkv, dout)
    )


@pytest.mark.gpu
def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    assert_right_behind_2_to_the_31(
        lambda qkv, dout: with_grads(full_attention(*qkv, impl="triton"), qkv, dout)
    )


@pytest.mark.gpu
def test_auto_on_a_gpu_makes_no_scores() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for cu_seqlens in (None, borders(20000)):
            qkv = [x[:1].detach() for x in on_device(20000, (2, 1), 64, dtype)]
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            leaves = [x.requires_grad_() for x in qkv]
            full_attention(*leaves, cu_seqlens=cu_seqlens).sum().backward()
            assert torch.cuda.max_memory_allocated() - before < 20000 * 20000

"""Tensorized attention's kernels: against the dense reference, over shards, and refused.

Without a GPU they run in Triton's interpreter; tests marked `gpu` need one.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist_kernels import Rotary, tensorized_attention, tensorized_reference
from lcdist_kernels.tensorized import ModeGrid, select_tensorized_impl
from lcdist_kernels.tensorized import launch as launchers
from lcdist_kernels.tensorized.impl import TORCH_IMPL, TRITON_IMPL
from lcdist_kernels.triton_common import Launch
from tests.attention.body import Variant, make, on_virtual_ranks, whole
from tests.kernels.helpers import (
    HERE,
    REFUSED,
    assert_close,
    assert_refused,
    in_nan,
    on_device,
    on_its_device,
    wide,
)
from tests.kernels.repeat import assert_same_bits
from tests.kernels.test_full import with_grads
from tests.kernels.test_rotary import frequencies
from tests.kernels.test_tensorized import aligned_borders, name
from tests.kernels.tiers import one, tiered
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager

# Several tiles a fibre, tiles cut off by its end, one block that sees three before it.
GRIDS = [
    ModeGrid((40,), local_blocks=2),
    ModeGrid((70,), pe="global"),
    ModeGrid((9, 7), hop_heads="kv"),
]
CASES = [(grid, n, (2, 1), 16) for grid in GRIDS for n in (1, 63, 100, 257)]
# Two modes take longest in the interpreter, and 100 tokens are two of their blocks already.
TOO_LONG = (GRIDS[2], 257, (2, 1), 16)
CASES += [(ModeGrid((64,), local_blocks=2), 256, (2, 1), 16)]
CASES += [(ModeGrid((20,), local_blocks=4), 63, heads, 16) for heads in ((8, 8), (8, 4), (8, 1))]
CASES += [(ModeGrid((9, 2)), 63, (2, 1), 16), (ModeGrid((2, 3, 4), hop_heads="kv"), 26, (2, 1), 16)]
CASES += [(ModeGrid((20,)), 70, (2, 1), head_dim) for head_dim in (18, 48, 80)]
SMALL = [Launch(16, 16, 4, 1), Launch(32, 16, 4, 1), Launch(16, 32, 4, 1)]


def leaves_of(
    grid: ModeGrid, seqlen: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """One row of q, k and v, and a bias."""
    bias = torch.randn(len(grid.modes), heads[0], device=HERE)
    qkv = [x.detach()[:1].clone() for x in on_device(seqlen, heads, head_dim, dtype)]
    return [x.requires_grad_() for x in (*qkv, bias)]


def truth_of(leaves: list[Tensor], dout: Tensor, **more: Any) -> list[Tensor]:
    doubles = wide(leaves)
    out = tensorized_reference(*doubles[:3], branch_bias=doubles[3], **more)
    return with_grads(out, doubles, dout.cpu().double())


def by_kernels(leaves: list[Tensor], dout: Tensor, **more: Any) -> list[Tensor]:
    out = tensorized_attention(*leaves[:3], branch_bias=leaves[3], **more, impl="triton")
    return with_grads(out, leaves, dout)


@pytest.mark.parametrize(
    ("packed", "grid", "seqlen", "heads", "head_dim"),
    # Documents in every other case. By default every grid once, one token, and a head_dim of 18.
    tiered(
        [(n % 2 == 1, *case) for n, case in enumerate(CASES) if case != TOO_LONG],
        {0, 1, 5, 9, 15, 17},
    ),
    ids=lambda value: name(value) if isinstance(value, ModeGrid) else None,
)
def test_equals_reference(
    grid: ModeGrid, seqlen: int, heads: tuple[int, int], head_dim: int, packed: bool
) -> None:
    leaves = leaves_of(grid, seqlen, heads, head_dim, torch.float32)
    dout = torch.randn_like(leaves[0])
    more = {
        "grid": grid,
        "rotary": Rotary(frequencies(head_dim), 1.1),
        "cu_seqlens": aligned_borders(seqlen, grid.block) if packed else None,
    }
    got = by_kernels(leaves, dout, **more)
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, truth_of(leaves, dout, **more))


@pytest.mark.parametrize(
    ("grid", "launch"),
    tiered(
        [
            *((ModeGrid((40,), local_blocks=3), launch) for launch in SMALL),
            *((ModeGrid((38,), hop_heads="kv"), launch) for launch in SMALL),
            (ModeGrid((2, 33)), SMALL[2]),
        ],
        {0, 4},
    ),
)
def test_any_tiles(grid: ModeGrid, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "choose_launch", lambda table, x, hopper: launch)
    leaves = leaves_of(grid, 100, (2, 1), 16, torch.float32)
    dout, more = torch.randn_like(leaves[0]), {"grid": grid, "softmax_scale": 0.4}
    # A document of two blocks: of one block alone, nothing would read what a hop gives.
    more["cu_seqlens"] = torch.tensor([0, 2 * grid.block]) if len(grid.modes) == 1 else None
    assert_close(by_kernels(leaves, dout, **more), truth_of(leaves, dout, **more))


@pytest.mark.parametrize(
    ("modes", "seqlen", "heads", "together"),
    tiered(
        [
            ((9,), 30, (4, 1), 4),
            ((9, 7), 130, (4, 1), 4),
            ((9, 7), 130, (6, 1), 2),
            ((12, 3), 100, (4, 2), 2),
        ],
        {0},
    ),
)
def test_short_fibres_of_several_heads_share_a_tile(
    modes: tuple[int, ...],
    seqlen: int,
    heads: tuple[int, int],
    together: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    launched = []
    for kernel_name in ("_tensorized_fwd_kernel", "_tensorized_bwd_dq_kernel"):
        kernel = getattr(launchers, kernel_name)

        class Spy:
            def __getitem__(self, programs: tuple[int], kernel=kernel) -> Any:
                def launch(*args: Any, **words: Any) -> None:
                    launched.append((words["HOP"], words["HEADS"], programs[0]))
                    kernel[programs](*args, **words)

                return launch

        monkeypatch.setattr(launchers, kernel_name, Spy())
    monkeypatch.setattr(launchers, "choose_launch", lambda *_: Launch(64, 16, 4, 1))
    grid = ModeGrid(modes, hop_heads="kv")
    leaves = leaves_of(grid, seqlen, heads, 16, torch.float32)
    dout, more = torch.randn_like(leaves[0]), {"grid": grid, "rotary": Rotary(frequencies(16))}
    more["cu_seqlens"] = torch.tensor([0, 2 * grid.block])
    assert_close(by_kernels(leaves, dout, **more), truth_of(leaves, dout, **more))
    # No fibre has more than 16 tokens, so each is a tile of one head, or of several.
    padded = seqlen + -seqlen % grid.block
    hops = [(True, 1, padded // size * heads[1]) for size in modes]
    branches = [
        (False, together, fibres * heads[0] // together)
        for fibres in (*(padded // size for size in modes), grid.block)
    ]
    assert sorted(launched) == sorted(2 * (hops + branches))


@pytest.mark.parametrize("scale", tiered(one([-0.3, 0.0, 2.5]), {0}))
def test_any_scale(scale: float) -> None:
    grid = ModeGrid((20,), local_blocks=2)
    leaves = leaves_of(grid, 63, (2, 1), 16, torch.float32)
    dout, more = torch.randn_like(leaves[0]), {"grid": grid, "softmax_scale": scale}
    assert_close(by_kernels(leaves, dout, **more), truth_of(leaves, dout, **more))


def test_large_logits_are_no_harm() -> None:
    # Weights are 0 or 1 and most gradients nothing: what is left of them is rounding.
    grid = ModeGrid((20,), local_blocks=2)
    leaves = leaves_of(grid, 63, (2, 1), 16, torch.float32)
    dout, more = torch.randn_like(leaves[0]), {"grid": grid, "softmax_scale": 80.0}
    got, truth = by_kernels(leaves, dout, **more), truth_of(leaves, dout, **more)
    assert all(torch.isfinite(x).all() for x in got)
    for place in (0, 3):
        assert_close([got[place]], [truth[place]])


def test_scores_far_below_zero_are_those_of_a_shift() -> None:
    # A key that is not there has a score of 0, which must not count however low the others are.
    leaves = leaves_of(ModeGrid((20,)), 50, (2, 1), 16, torch.float32)
    dout = torch.randn_like(leaves[0])
    with torch.no_grad():
        leaves[0][..., 0], leaves[1][..., 0] = 1.0, 0.0
    truth = truth_of(leaves, dout, grid=ModeGrid((20,)))
    with torch.no_grad():
        leaves[1][..., 0] = -1024.0
    got = by_kernels(leaves, dout, grid=ModeGrid((20,)))
    # But for the feature that shifts, in dq.
    got[1], truth[1] = got[1][..., 1:], truth[1][..., 1:]
    assert_close(got, truth)


def assert_accurate(
    grid: ModeGrid, seqlen: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    leaves, rotary = leaves_of(grid, seqlen, heads, head_dim, dtype), Rotary(frequencies(head_dim))
    dout = torch.randn_like(leaves[0])
    more = {"grid": grid, "rotary": rotary}
    got, truth = by_kernels(leaves, dout, **more), truth_of(leaves, dout, **more)
    out = eager(leaves, grid, rotary)
    plain = with_grads(out, leaves, dout)
    for a, e, r, x in zip(got, plain, truth, [leaves[0], *leaves], strict=True):
        assert a.dtype == x.dtype
        assert_as_good_as_eager(a, e, r)


def eager(leaves: list[Tensor], grid: ModeGrid, rotary: Rotary) -> Tensor:
    """Scores, weights and the U_j in the inputs' own dtype; one document."""
    q, k, u, bias = leaves
    group, place = q.shape[2] // k.shape[2], torch.arange(q.shape[1])
    scale, logits, masks, values = q.shape[3] ** -0.5, [], [], []
    u = u.repeat_interleave(group, 2)
    for mode in range(len(grid.modes) + 1):
        turned = [rotary.rotate(x, grid.angle(place, mode)) for x in (q, k)]
        q_mode, k_mode = turned[0], turned[1].repeat_interleave(group, 2)
        scores = torch.einsum("bshd,bthd->bhst", q_mode, k_mode) * scale
        own = 0.0 if mode == 0 else bias[mode - 1].to(q.dtype)[:, None, None]
        masks.append(grid.branch_mask(place, place, mode).to(q.device))
        logits.append((scores + own).masked_fill(~masks[-1], -torch.inf))
        values.append(u)
        if mode == len(grid.modes):
            break
        if grid.hop_heads == "kv":
            q_mode = q_mode.unflatten(2, (-1, group)).mean(3).repeat_interleave(group, 2)
            scores = torch.einsum("bshd,bthd->bhst", q_mode, k_mode) * scale
        fibre = grid.hop_mask(place, place, mode).to(q.device)
        weights = scores.masked_fill(~fibre, -torch.inf).softmax(-1)
        u = torch.einsum("bhst,bthd->bshd", weights, u)
    weights = torch.cat(logits, -1).softmax(-1)
    return torch.einsum("bhst,bthd->bshd", weights, torch.cat(values, 1))


@pytest.mark.parametrize(
    ("grid", "dtype"),
    tiered(
        [
            (ModeGrid((20,), local_blocks=2), torch.float16),
            (ModeGrid((20,), local_blocks=2), torch.bfloat16),
            (ModeGrid((6, 4), hop_heads="kv"), torch.float16),
        ],
        {2},
    ),
)
def test_as_good_as_eager_in_half_precision(grid: ModeGrid, dtype: torch.dtype) -> None:
    # The last block has one token.
    assert_accurate(grid, 2 * grid.block + 1, (2, 1), 48, dtype)


# A ratio of errors says nothing of one token, whose dq and dk are 0: fp32 has that case.
@pytest.mark.parametrize("seqlen", tiered(one([63, 257]), {0}))
def test_half_precision_at_any_length(seqlen: int) -> None:
    assert_accurate(ModeGrid((64,), local_blocks=2), seqlen, (2, 1), 16, torch.float16)


def test_any_strides_are_taken_and_nothing_outside_is_read() -> None:
    grid, rotary = ModeGrid((10,), local_blocks=2), Rotary(frequencies(20))
    leaves = leaves_of(grid, 25, (4, 2), 20, torch.float32)
    dout, more = torch.randn_like(leaves[0]), {"grid": grid, "rotary": rotary}
    truth = by_kernels(leaves, dout, **more)
    strided = [*(in_nan(x.detach()) for x in leaves[:3]), leaves[3].detach()]
    strided = [x.requires_grad_() for x in strided]
    for actual, reference in zip(by_kernels(strided, in_nan(dout), **more), truth, strict=True):
        assert torch.equal(actual, reference)


@pytest.mark.parametrize(
    ("words", "cp_size", "packed"),
    tiered(
        [
            ({"modes": (12,), "local_blocks": 2}, 2, True),
            ({"modes": (12,), "local_blocks": 3}, 3, False),
            ({"modes": (5, 3), "local_blocks": 1, "hop_heads": "kv"}, 2, True),
            ({"modes": (24,), "local_blocks": 1, "hop_heads": "q"}, 3, True),
            ({"modes": (), "local_blocks": 1}, 2, True),
        ],
        {0},
    ),
)
def test_shards_of_kernels_equal_those_of_torch(
    words: dict[str, Any], cp_size: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Variant("tensorized", None).method.options(**words)
    variant = Variant("tensorized", options)
    problem = make(variant, "contiguous", cp_size, packed=packed, at_least=70, dtype=torch.float32)
    on_its_device(problem)
    sent_by_torch = on_virtual_ranks(problem, "torch")[1]
    # Tiled torch cannot stand in unseen.
    monkeypatch.setattr("lcdist_kernels.tensorized.tiled.add_grads", None)
    monkeypatch.setattr("lcdist_kernels.tensorized.tiled.full_fwd", None)
    got, sent = on_virtual_ranks(problem, "triton")
    assert_close(got, whole(problem))
    assert sent == sent_by_torch


def test_what_is_kept_for_the_backward() -> None:
    grid = ModeGrid((4, 3))
    q, k, v, bias = leaves_of(grid, 24, (4, 2), 16, torch.float16)
    with saved_bytes() as saved:
        tensorized_attention(q, k, v, grid=grid, branch_bias=bias, impl="triton")
    # q, k, v, out and two U in half; lse, two lambda and the bias in fp32.
    halves = 4 * q.numel() + k.numel() + v.numel()
    assert sum(saved.values()) == 2 * halves + 4 * (3 * 4 * 24 + 2 * 4)


@pytest.mark.parametrize(("head_dim", "dtype", "says"), REFUSED)
def test_what_no_kernel_takes_is_refused(head_dim: int, dtype: torch.dtype, says: str) -> None:
    attend = partial(tensorized_attention, grid=ModeGrid((2,)), impl="triton")
    assert_refused("tensorized", attend, head_dim, dtype, says)


def test_who_carries_it() -> None:
    q = torch.zeros(1, 4, 2, 16, device=HERE)
    assert select_tensorized_impl("triton", q, "test") is TRITON_IMPL
    assert select_tensorized_impl("torch", q, "test") is TORCH_IMPL
    # Never interpreted unasked.
    assert select_tensorized_impl("auto", q, "test") is (TRITON_IMPL if q.is_cuda else TORCH_IMPL)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "grid", [ModeGrid((128,), local_blocks=2), ModeGrid((64, 4), hop_heads="kv")]
)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_good_as_eager_on_a_gpu(dtype: torch.dtype, head_dim: int, grid: ModeGrid) -> None:
    assert_accurate(grid, 1000, (8, 2), head_dim, dtype)


@pytest.mark.gpu
def test_the_same_bits_twice() -> None:
    grid = ModeGrid((128,), local_blocks=2)
    leaves = leaves_of(grid, 3000, (8, 2), 64, torch.bfloat16)
    dout = torch.randn_like(leaves[0])
    assert_same_bits(lambda: by_kernels(leaves, dout, grid=grid))


@pytest.mark.gpu
def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    # Tokens so far apart that the last blocks lie behind 2^31 elements.
    grid, far = ModeGrid((256,), local_blocks=2), 2**31 // 4096 + 64
    leaves = leaves_of(grid, 5000, (2, 1), 64, torch.bfloat16)
    dout = torch.randn_like(leaves[0])
    truth = by_kernels(leaves, dout, grid=grid)
    apart = []
    for x in leaves[:3]:
        home = torch.empty(1, 5120, 1, far, dtype=x.dtype, device=HERE)
        view = home[:, :5000, 0, : x.shape[2] * 64].unflatten(2, (x.shape[2], 64))
        apart.append(view.copy_(x.detach()).requires_grad_())
        assert home.numel() > 2**31
    got = by_kernels([*apart, leaves[3]], dout, grid=grid)
    assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))

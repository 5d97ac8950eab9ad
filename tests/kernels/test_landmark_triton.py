"""Landmark attention's kernels: against the dense reference, piece by piece, by lists, on ranks.

Without a GPU they run in Triton's interpreter; tests marked `gpu` need one.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcdist.config.schema import LandmarkOptions
from lcdist_kernels import Rotary, landmark_attention, landmark_reference
from lcdist_kernels.landmark import (
    TORCH_IMPL,
    TRITON_IMPL,
    BlockLists,
    QueryRows,
    block_grid,
    landmark_partial,
    select_landmark_impl,
    sparse_launch,
)
from lcdist_kernels.landmark.inner_loop import Tiling, tiling_of
from lcdist_kernels.landmark.union import invert, unite
from lcdist_kernels.partial import merge
from lcdist_kernels.triton_common import Launch
from tests.attention.body import Variant, make, on_virtual_ranks
from tests.kernels import test_compiles
from tests.kernels.helpers import (
    FP32,
    HERE,
    SMALL,
    assert_close,
    assert_close_partial,
    in_nan,
    on_device,
    on_its_device,
    truth_by,
    wide,
)
from tests.kernels.repeat import assert_right_behind_2_to_the_31, assert_same_bits
from tests.kernels.test_full import borders, with_grads
from tests.kernels.test_rotary import frequencies
from tests.kernels.tiers import covering, one, tiered
from tests.saved import saved_bytes
from tests.tolerance import assert_as_good_as_eager

WIDE = Launch(16, 64, 4, 1)
UNITS: dict[str, Any] = {"top_k": 2, "select_tokens": 45}
# Sequence, heads, head_dim, block_size, choice.
SHAPES: list[tuple[int, tuple[int, int], int, int, dict[str, Any]]] = [
    (1, (4, 2), 16, 7, {}),
    (1, (4, 2), 16, 7, UNITS),
    (63, (4, 2), 16, 2, {}),
    (63, (4, 2), 16, 7, UNITS),
    (63, (8, 8), 16, 7, {}),
    (100, (8, 4), 16, 32, {}),
    (63, (8, 1), 16, 7, {}),
    (100, (8, 1), 16, 32, UNITS),
    (128, (4, 2), 16, 64, {}),
    (128, (4, 2), 16, 64, UNITS),
    (257, (2, 1), 16, 32, {}),
    (257, (2, 1), 16, 100, {}),
    (257, (2, 1), 16, 100, UNITS),
    (70, (2, 1), 18, 7, {}),
    (70, (2, 1), 48, 7, {}),
    (70, (3, 1), 80, 32, UNITS),
    (70, (2, 1), 256, 32, {}),
]


truth_of = truth_by(landmark_reference)


def by_kernel(qkv: list[Tensor], dout: Tensor, **more: Any) -> list[Tensor]:
    return with_grads(landmark_attention(*qkv, impl="triton", **more), qkv, dout)


@pytest.mark.parametrize(
    ("seqlen", "heads", "head_dim", "block_size", "choice", "packed"),
    # By default every other shape, documents in every other one of these.
    tiered(
        [
            (*shape, bool(turn))
            for n, shape in enumerate(SHAPES)
            for turn in (n // 2 % 2, 1 - n // 2 % 2)
        ],
        range(0, 2 * len(SHAPES), 4),
    ),
)
def test_equals_reference(
    seqlen: int,
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    choice: dict[str, Any],
    packed: bool,
) -> None:
    qkv = on_device(seqlen, heads, head_dim, torch.float32)
    dout = torch.randn_like(qkv[0])
    more = {
        "rotary": Rotary(frequencies(head_dim), 1.1),
        "cu_seqlens": borders(seqlen) if packed else None,
        "block_size": block_size,
        **choice,
    }
    got = by_kernel(qkv, dout, **more)
    assert all(x.dtype == torch.float32 for x in got)
    assert_close(got, truth_of(qkv, dout, **more))


@pytest.mark.parametrize(("unit", "packed"), [(1, True), (5, False)])
def test_units_shorter_than_a_chunk_of_rows(unit: int, packed: bool) -> None:
    qkv = on_device(45, (3, 1), 16, torch.float32)
    dout = torch.randn_like(qkv[0])
    cu_seqlens = torch.tensor([0, 7, 38], dtype=torch.int32) if packed else None
    more = {"block_size": 3, "top_k": 2, "select_tokens": unit, "cu_seqlens": cu_seqlens}
    assert_close(by_kernel(qkv, dout, **more), truth_of(qkv, dout, **more))


def test_the_union_of_the_lists_of_neighbouring_rows() -> None:
    lengths = torch.tensor([3, 1, 10, 26])
    chosen = torch.tensor([[[[0, 4], [4, -1], [1, 2], [2, 300]]]], dtype=torch.int32, device=HERE)
    found = unite(chosen, lengths, 301, 40, 16)
    # A chunk of 16 rows reads at most 32 blocks, a half 16.
    assert found.lists.shape == found.members.shape == (1, 1, 3, 32)
    assert found.half_lists.shape == found.half_members.shape == (1, 1, 6, 16)
    # Rows 0 to 2 read block 0; 3 reads block 4 too; the third unit has rows 4 to 13.
    halves: list[dict[int, int]] = [
        {0: 0b111, 1: 0b11110000, 2: 0b11110000, 4: 0b1111},
        {1: 0b111111, 2: 0b11111111, 300: 0b11000000},
        *({2: 0b11111111, 300: 0b11111111},) * 3,
        {},
    ]
    assert found.sizes.tolist() == [[[[5, 4, 3], [2, 2, 2], [2, 2, 0]]]]

    def entries(lists: Tensor, members: Tensor, index: int, size: int) -> dict[int, int]:
        numbers, bits = (x[0, 0, index, :size].tolist() for x in (lists, members))
        assert numbers == sorted(numbers)
        return dict(zip(numbers, bits, strict=True))

    for index, expected in enumerate(halves):
        size = int(found.sizes[0, 0, index // 2, 1 + index % 2])
        assert entries(found.half_lists, found.half_members, index, size) == expected
    for index, (first, second) in enumerate(zip(halves[::2], halves[1::2], strict=True)):
        whole = {n: first.get(n, 0) | second.get(n, 0) << 8 for n in first | second}
        size = int(found.sizes[0, 0, index, 0])
        assert entries(found.lists, found.members, index, size) == whole


@pytest.mark.parametrize(("size", "launch"), [(4, SMALL[1]), (40, Launch(64, 32, 4, 1))])
def test_chunks_that_walk_one_list_and_chunks_that_walk_two(size: int, launch: Launch) -> None:
    seqlen, blocks = 120, 33
    grid = block_grid(torch.tensor([0]), blocks * size, size)
    # The rows of the last blocks, so that all have past blocks.
    rows = grid.rows.part(blocks * size - seqlen, blocks * size)
    lengths = torch.ones(seqlen, dtype=torch.int64)
    chosen = torch.zeros(1, 2, seqlen, 3, dtype=torch.int32)
    first = torch.arange(seqlen) // 16 % 5
    # Of key head 0, halves of a chunk share no block; of key head 1, rows of a chunk share two.
    chosen[0, 0] = (3 * first[:, None] + torch.arange(3)).int()
    chosen[0, 0, first % 2 == 0, 2:] = -1
    chosen[0, 1] = torch.stack((0 * first, 0 * first + 1, 2 + torch.arange(seqlen) % 9), 1).int()
    found = unite(chosen.to(HERE), lengths, blocks, seqlen, 32)
    whole, one, two = found.sizes[0].unbind(-1)
    assert ((one + two) * 5 < whole * 8).tolist() == [[True] * 4, [False] * 4]
    q = torch.randn(1, seqlen, 4, 16, device=HERE)
    k, v = (torch.randn(1, grid.num_slots, 2, 16, device=HERE) for _ in range(2))
    units = (chosen, lengths, rows, 0.25)
    assert_local(q, k, v, units, launch)


@pytest.mark.parametrize("segment", [1, 7, 64])
def test_the_rows_that_read_a_block(segment: int) -> None:
    lengths, blocks = torch.tensor([3, 1, 30, 6, 5]), 70
    chosen = torch.rand(2, 3, 5, blocks).argsort(-1)[..., :4].sort(-1).values.int()
    chosen[:, 1, :, 1:], chosen[1, 2] = -1, -1
    readers, starts = invert(chosen.to(HERE), lengths, blocks, 45, segment)
    of_row = chosen.repeat_interleave(lengths, 2)
    for head, lists in enumerate(of_row.flatten(0, 1)):
        bounds = starts.flatten(0, 1)[head, :, 0].tolist()
        assert bounds[0] == 0 and bounds[-1] == int((lists >= 0).sum())
        for block, (first, stop) in enumerate(itertools.pairwise(bounds)):
            expected = (lists == block).any(1).nonzero()[:, 0].tolist()
            assert readers.flatten(0, 1)[head, first:stop].tolist() == expected


def assert_accurate(
    seqlen: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, **more: Any
) -> None:
    qkv = on_device(seqlen, heads, head_dim, dtype)
    dout = torch.randn_like(qkv[0])
    got, truth = by_kernel(qkv, dout, **more), truth_of(qkv, dout, **more)
    plain = eager(qkv, dout, **more)
    for a, e, r in zip(got, plain, truth, strict=True):
        assert a.dtype == dtype
        assert_as_good_as_eager(a, e, r)


def eager(qkv: list[Tensor], dout: Tensor, block_size: int, **choice: Any) -> list[Tensor]:
    """Compute the dense form in the tensors' own dtype, from scores to weights."""
    assert not choice
    q, k, v = qkv
    index = torch.arange(q.shape[1], device=q.device)
    block = index // block_size
    mark = index % block_size == block_size - 1
    same = block[:, None] == block
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * q.shape[3] ** -0.5
    own = same & (index <= index[:, None]) & ~mark
    past = (block[:, None] > block) & mark
    gates = scores.masked_fill(~(own | past), -torch.inf).softmax(-1)
    weights = torch.where(own, gates, 0.0)
    for n in range(int(block.max())):
        content = slice(n * block_size, (n + 1) * block_size - 1)
        inside = scores[..., content].softmax(-1)
        gate = torch.where(past[:, content.stop], gates[..., content.stop], 0.0)
        pad = (content.start, q.shape[1] - content.stop)
        weights = weights + torch.nn.functional.pad(inside * gate[..., None], pad)
    return with_grads(torch.einsum("bhst,bthd->bshd", weights, v), qkv, dout)


def test_eager_is_the_reference() -> None:
    qkv = wide(on_device(45, (4, 2), 16, torch.float32))
    dout = torch.randn_like(qkv[0])
    assert_close(eager(qkv, dout, 7), truth_of(qkv, dout, block_size=7), 1e-10)


@pytest.mark.parametrize(
    ("dtype", "block_size"), covering(one([torch.float16, torch.bfloat16]), one([9, 100]))
)
def test_as_good_as_eager_in_half_precision(dtype: torch.dtype, block_size: int) -> None:
    assert_accurate(130, (4, 2), 48, dtype, block_size=block_size)


# A ratio of errors says nothing of one token, whose dq and dk are 0: fp32 has that case.
@pytest.mark.parametrize("seqlen", [63, pytest.param(128, marks=pytest.mark.exhaustive), 257])
def test_half_precision_at_any_length(seqlen: int) -> None:
    assert_accurate(seqlen, (4, 1), 16, torch.float16, block_size=16)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.exhaustive), torch.bfloat16]
)
def test_lists_in_half_precision_are_as_good_as_the_tiled_operator(dtype: torch.dtype) -> None:
    qkv = on_device(100, (4, 2), 48, dtype)
    dout = torch.randn_like(qkv[0])
    more = {"block_size": 9, "top_k": 3, "select_tokens": 31}
    truth = truth_of(qkv, dout, **more)
    # The tiled operator sums and multiplies in fp32, the kernel's products are of this dtype.
    for actual, reference in zip(by_kernel(qkv, dout, **more), truth, strict=True):
        assert actual.dtype == dtype
        assert_close([actual], [reference], torch.finfo(dtype).eps)


@pytest.mark.parametrize("choice", [{}, UNITS])
def test_any_strides_are_taken_and_nothing_outside_is_read(choice: dict[str, Any]) -> None:
    plain = [x.detach() for x in on_device(70, (4, 2), 20, torch.float32)]
    dout = torch.randn_like(plain[0])
    qkv = [x.requires_grad_() for x in plain]
    more = {"block_size": 7, **choice}
    truth = by_kernel(qkv, dout, **more)
    strided = [in_nan(x.detach()).requires_grad_() for x in plain]
    got = by_kernel(strided, in_nan(dout), **more)
    for actual, reference in zip(got, truth, strict=True):
        assert torch.equal(actual, reference)


@pytest.mark.parametrize("choice", [UNITS, {**UNITS, "select_tokens": 1}])
def test_offsets_of_64_bits_read_the_same_rows(
    choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = on_device(40, (4, 2), 16, torch.float32)
    dout, more = torch.randn_like(qkv[0]), {"block_size": 7, **choice}
    truth = by_kernel(qkv, dout, **more)
    asked: list[Tensor] = []
    far = torch.empty(1, device="meta").as_strided((1, 3, 4, 8), (2**40, 2**30, 8, 1))
    assert sparse_launch.rows_are_wide(2, qkv[0], far)
    assert not sparse_launch.rows_are_wide(2, qkv[0], far[:, :1])
    monkeypatch.setattr(
        sparse_launch, "rows_are_wide", lambda heads, *tensors: bool(asked.extend(tensors)) or True
    )
    got = by_kernel(qkv, dout, **more)
    assert len(asked) == 2 and all(map(torch.equal, got, truth))


def pieces_of(seqlen: int, count: int, cut: str) -> list[Tensor]:
    if cut == "runs":
        return list(torch.arange(seqlen).chunk(count))
    parts = torch.arange(seqlen).chunk(2 * count)
    return [torch.cat((parts[i], parts[-1 - i])) for i in range(count)]


PIECES: list[tuple[int, int, str, bool, Launch]] = [
    (2, 48, "runs", False, SMALL[0]),
    (2, 48, "mirrored", True, SMALL[2]),
    (7, 84, "runs", True, SMALL[1]),
    (7, 84, "mirrored", False, SMALL[0]),
    (17, 204, "mirrored", True, SMALL[0]),
    (32, 192, "mirrored", False, SMALL[0]),
    (32, 192, "runs", True, SMALL[2]),
    (64, 384, "mirrored", True, WIDE),
    (64, 192, "runs", False, SMALL[1]),
    (100, 600, "mirrored", True, WIDE),
    (100, 300, "runs", False, WIDE),
    (40, 120, "runs", False, SMALL[0]),
]


@pytest.mark.parametrize(
    ("size", "seqlen", "cut", "packed", "launch"), tiered(PIECES, {0, 2, 5, 10})
)
def test_pieces_of_whole_blocks(
    size: int, seqlen: int, cut: str, packed: bool, launch: Launch
) -> None:
    # Documents of two and three blocks; the others are one.
    cu_seqlens = torch.tensor([0, 2 * size, 3 * size], dtype=torch.int32) if packed else None
    rows = block_grid(cu_seqlens, seqlen, size).rows
    q, k, v = (x.detach()[:1] for x in on_device(seqlen, (2, 1), 16, torch.float32))
    dout = torch.randn_like(q)
    piece, *others = pieces_of(seqlen, 3, cut)[::-1]
    mine = QueryRows(piece, rows.lo[piece], size)
    whole: tuple[Tensor, Tensor] | None = None
    for other in (piece, *others):
        one = (q[:, piece], k[:, other], v[:, other])
        out, lse = TRITON_IMPL.fwd(*one, mine, other[::size], 0.25, launch=launch)
        doubles = [x.cpu().double() for x in one]
        dense = landmark_partial(*doubles, mine, other[::size], 0.25)
        assert_close_partial(out, lse, dense)
        whole = (out, lse) if whole is None else merge(*whole, out, lse)
    assert whole is not None
    for other in (piece, *others):
        one = (dout[:, piece], q[:, piece], k[:, other], v[:, other], *whole)
        got = TRITON_IMPL.bwd(*one, mine, other[::size], 0.25, launches=(launch, launch))
        doubles = [x.cpu().double() for x in one]
        assert_close(list(got), list(TORCH_IMPL.bwd(*doubles, mine, other[::size], 0.25)))
        # No value of a landmark has a gradient.
        assert torch.all(got[2][:, size - 1 :: size] == 0)


def some_lists(
    rows: QueryRows, numbers: Tensor, lengths: Tensor, heads: tuple[int, int]
) -> BlockLists:
    """Random lists `[*heads, units, 5]`, increasing, with -1 in any place, of a shuffled table."""
    ids = torch.rand(*heads, len(lengths), len(numbers)).argsort(-1)[..., :5].sort(-1).values
    ids = ids.masked_fill(torch.rand(ids.shape) < 0.2, -1)
    return BlockLists(numbers.to(HERE), ids.int().to(HERE), lengths)


@pytest.mark.parametrize(
    ("size", "launch", "group"),
    covering(
        [(2, SMALL[0]), (7, SMALL[1]), (32, SMALL[2]), (32, SMALL[0]), (64, WIDE), (100, WIDE)],
        one([1, 3]),
    ),
)
def test_lists(size: int, launch: Launch, group: int) -> None:
    blocks = 7
    seqlen = size * blocks
    index = torch.arange(0, seqlen, max(1, size // 4))
    rows = QueryRows(index, torch.zeros_like(index), size)
    lengths = torch.tensor([1, 4, 4, len(index) - 9])
    lists = some_lists(rows, torch.randperm(blocks), lengths, (1, 2))
    q = torch.randn(1, len(index), 2 * group, 16, device=HERE)
    # Two entries more than are ever named.
    table = torch.randn(blocks + 2, 2, size, 16, device=HERE)
    lists = lists._replace(numbers=torch.cat((lists.numbers, lists.numbers[:2])))
    out, lse = TRITON_IMPL.sparse_fwd(q, table, lists, rows, 0.25, launch=launch)
    wide_lists = BlockLists(lists.numbers.cpu(), lists.ids.cpu(), lengths)
    doubles = [x.cpu().double() for x in (q, table)]
    true_out, true_lse = TORCH_IMPL.sparse_fwd(*doubles, wide_lists, rows, 0.25)
    empty = true_lse == -torch.inf
    assert empty.any() and not empty.all()
    assert torch.equal(lse.cpu() == -torch.inf, empty)
    assert_close([out], [true_out])
    assert_close([lse.cpu().masked_fill(empty, 0)], [true_lse.masked_fill(empty, 0)])
    # As if there were more keys than the listed ones.
    more = (torch.randn_like(out), true_lse.clamp(min=0).float().to(HERE) + 0.5)
    one = (torch.randn_like(q), q, table, *more)
    got = TRITON_IMPL.sparse_bwd(*one, lists, rows, 0.25, launches=(launch, launch))
    truth = TORCH_IMPL.sparse_bwd(*(x.cpu().double() for x in one), wide_lists, rows, 0.25)
    assert_close(list(got), list(truth))
    assert torch.all(got[1][-2:] == 0)


@pytest.mark.parametrize(
    ("size", "launch", "group"),
    tiered(
        [
            (7, SMALL[1], 3),
            (40, Launch(64, 32, 4, 1), 1),
            (2, SMALL[1], 1),
            (32, SMALL[2], 3),
            (100, WIDE, 1),
            (50, SMALL[0], 1),
        ],
        {0, 1},
    ),
)
def test_own_and_chosen_blocks(size: int, launch: Launch, group: int) -> None:
    grid = block_grid(torch.tensor([0, size + 1]), 4 * size, size)
    lengths = torch.tensor([1, size, size, 2 * size - 1])
    blocks = grid.num_slots // size
    chosen = torch.rand(1, 2, 4, blocks).argsort(-1)[..., :3].sort(-1).values.int()
    chosen[:, :, 2:, 2:] = -1
    q = torch.randn(1, 4 * size, 2 * group, 16, device=HERE)
    k, v = (torch.randn(1, grid.num_slots, 2, 16, device=HERE) for _ in range(2))
    got = assert_local(q, k, v, (chosen, lengths, grid.rows, 0.25), launch)
    # No value of a landmark has a gradient.
    assert torch.all(got[2][:, size - 1 :: size] == 0)


def assert_local(
    q: Tensor, k: Tensor, v: Tensor, units: tuple[Any, ...], launch: Launch
) -> list[Tensor]:
    """Assert that attention over own and chosen blocks is torch's; return the gradients.

    units: chosen blocks on the CPU, lengths, rows and scale.
    """
    chosen, *more = units
    here = (chosen.to(HERE), *more)
    out, lse = TRITON_IMPL.local_fwd(q, k, v, *here, launch=launch)
    doubles = [x.cpu().double() for x in (q, k, v)]
    truth = TORCH_IMPL.local_fwd(*doubles, *units)
    assert_close([out, lse], list(truth))
    dout = torch.randn_like(q)
    got = TRITON_IMPL.local_bwd(
        dout, q, k, v, truth[0].float().to(HERE), truth[1].float().to(HERE), *here,
        launches=(launch, launch),
    )  # fmt: skip
    expected = TORCH_IMPL.local_bwd(dout.cpu().double(), *doubles, *truth, *units)
    assert_close(list(got), list(expected))
    return list(got)


def test_rows_that_see_nothing() -> None:
    q, k, v = (x.detach() for x in on_device(12, (2, 2), 16, torch.float32))
    rows, k_start = QueryRows(torch.arange(12), torch.zeros(12).long(), 4), torch.tensor([4, 8, 12])
    out, lse = TRITON_IMPL.fwd(q, k, v, rows, k_start, 0.25)
    assert torch.all(lse[..., :4] == -torch.inf) and torch.all(out[:, :4] == 0)
    assert torch.isfinite(lse[..., 4:]).all() and torch.isfinite(out).all()
    # Their lse of the whole row may be -inf too: their share of every gradient is zero.
    grads = TRITON_IMPL.bwd(torch.randn_like(q), q, k, v, out, lse, rows, k_start, 0.25)
    assert torch.all(grads[0][:, :4] == 0) and all(torch.isfinite(x).all() for x in grads)
    nothing = TRITON_IMPL.fwd(q, k[:, :0], v[:, :0], rows, k_start[:0], 0.25)
    assert torch.all(nothing[0] == 0) and torch.all(nothing[1] == -torch.inf)


@pytest.mark.parametrize("entries", [0, 3])
def test_lists_of_nothing_and_of_an_empty_table(entries: int) -> None:
    q = on_device(12, (4, 2), 16, torch.float32)[0].detach()
    rows = QueryRows(torch.arange(12), torch.zeros(12).long(), 4)
    none = torch.full((2, 2, 3, 5), -1, dtype=torch.int32, device=HERE)
    table = torch.randn(entries, 2, 4, 16, device=HERE)
    lists = BlockLists(torch.arange(entries, device=HERE), none, torch.full((3,), 4))
    out, lse = TRITON_IMPL.sparse_fwd(q, table, lists, rows, 0.25)
    assert torch.all(out == 0) and torch.all(lse == -torch.inf)
    dq, dtable = TRITON_IMPL.sparse_bwd(q, q, table, out, torch.zeros_like(lse), lists, rows, 0.25)
    assert torch.all(dq == 0) and torch.all(dtable == 0) and dtable.shape == table.shape


@pytest.mark.parametrize(("block_size", "choice"), covering(one([5, 70]), one([{}, UNITS])))
def test_extreme_scores_do_no_harm(block_size: int, choice: dict[str, Any]) -> None:
    qkv = on_device(150, (4, 2), 16, torch.float32)
    with torch.no_grad():
        qkv[0].sign_()
        qkv[1].sign_()
    # Scores are multiples of 10 from -80 on to 80, in blocks and at landmarks.
    dout = torch.randn_like(qkv[0])
    more = {"block_size": block_size, "softmax_scale": 5.0, **choice}
    assert_close(by_kernel(qkv, dout, **more), truth_of(qkv, dout, **more))


@pytest.mark.parametrize(
    ("scale", "choice"),
    [(-20.0, {}), (0.0, {}), (-20.0, {"top_k": 1, "select_tokens": 14})],
)
def test_any_scale(scale: float, choice: dict[str, int]) -> None:
    qkv = on_device(28, (2, 1), 16, torch.float32)
    dout = torch.randn_like(qkv[0])
    more = {"block_size": 7, "softmax_scale": scale, **choice}
    assert_close(by_kernel(qkv, dout, **more), truth_of(qkv, dout, **more))


@pytest.mark.parametrize(
    ("options", "kind", "cp_size", "packed"),
    tiered(
        [
            (LandmarkOptions(block_size=4), "contiguous", 2, True),
            (LandmarkOptions(block_size=7), "contiguous", 3, False),
            (LandmarkOptions(block_size=4), "zigzag", 2, False),
            (LandmarkOptions(block_size=3), "zigzag", 3, True),
            (LandmarkOptions(block_size=4, top_k=2, select_tokens=8), "contiguous", 2, False),
            (LandmarkOptions(block_size=3, top_k=2, select_tokens=9), "contiguous", 3, True),
        ],
        {0, 3, 4},
    ),
)
def test_ranks_of_kernels_equal_ranks_of_torch(
    options: LandmarkOptions, kind: str, cp_size: int, packed: bool
) -> None:
    variant = Variant("landmark", options)
    problem = make(variant, kind, cp_size, packed=packed, at_least=48, dtype=torch.float32)
    on_its_device(problem)
    got, sent = on_virtual_ranks(problem, "triton")
    expected, sent_by_torch = on_virtual_ranks(problem, "torch")
    assert_close(got, expected)
    assert sent == sent_by_torch


@pytest.mark.parametrize("choice", [{}, {"top_k": 2, "select_tokens": 64}])
def test_saves_inputs_out_and_lse_alone(choice: dict[str, Any]) -> None:
    q, k, v = on_device(128, (4, 1), 16, torch.float16)
    with saved_bytes() as saved:
        landmark_attention(q, k, v, block_size=16, impl="triton", **choice)
    assert sum(saved.values()) == 2 * (2 * q.numel() + 2 * k.numel()) + 4 * (2 * 128 * 4)


@pytest.mark.parametrize("choice", [{}, {"top_k": 1}])
def test_what_no_kernel_takes_is_refused(choice: dict[str, Any]) -> None:
    for head_dim, dtype, says in (
        (16, torch.float64, "bf16, fp16 and fp32, the tensors are torch.float64"),
        (14, torch.float32, "even head_dim from 16 to 256, not 14"),
    ):
        qkv = on_device(9, (2, 1), head_dim, dtype)
        with pytest.raises(ValueError, match=says):
            landmark_attention(*qkv, block_size=4, impl="triton", **choice)
        rows = block_grid(None, 8, 4).rows
        with pytest.raises(ValueError, match="use impl = 'auto' or 'torch'"):
            eight = [x.detach()[:, :8] for x in qkv]
            TRITON_IMPL.fwd(*eight, rows, torch.tensor([0, 4]), 0.25)


def test_who_carries_it() -> None:
    x = torch.zeros(1, 4, 2, 16)
    assert select_landmark_impl("triton", x.to(HERE), "test") is TRITON_IMPL
    assert select_landmark_impl("torch", x.to(HERE), "test") is TORCH_IMPL
    # Never interpreted unasked.
    assert select_landmark_impl("auto", x, "test") is TORCH_IMPL


def test_how_blocks_lie_in_tiles() -> None:
    assert tiling_of(2, 64) == Tiling(2, 32, 2, 1)
    assert tiling_of(51, 64) == tiling_of(64, 64)._replace(size=51) == Tiling(51, 1, 64, 1)
    assert tiling_of(33, 128) == Tiling(33, 2, 64, 1)
    assert tiling_of(100, 64) == Tiling(100, 1, 64, 2)
    assert tiling_of(300, 64) == Tiling(300, 1, 64, 5)


PROGRAM = """
import torch
from lcdist_kernels.landmark import TRITON_IMPL, block_starts, block_grid, table_of, unit_lengths
from lcdist_kernels.landmark.sparse import list_blocks
from tests.kernels.compiling import SHARED, compiled_for

index = torch.arange(512)
lengths = unit_lengths(index, torch.zeros_like(index), 128)
# A compilation takes seconds, so each capability has one shape.
shapes = {80: [(128, torch.bfloat16, 256)], 90: [(80, torch.float16, 100)]}
for head_dim, dtype, size in shapes[CAPABILITY]:
    grid = block_grid(torch.tensor([0, 100]), 512, size)
    q = torch.zeros(1, 512, 4, head_dim, dtype=dtype)
    k = torch.zeros(1, grid.num_slots, 2, head_dim, dtype=dtype)
    chosen = torch.zeros(1, 2, len(lengths), 3, dtype=torch.int32)
    units = (chosen, lengths, grid.rows, 0.25)
    short = (torch.zeros(1, 2, 512, 3, dtype=torch.int32), torch.ones_like(index), *units[2:])
    lists = list_blocks(chosen, grid.num_slots // size, lengths)
    table = table_of(k, k, size)
    band = (grid.rows, block_starts(grid.num_slots, size), 0.25)
    with compiled_for(CAPABILITY) as made:
        out, lse = TRITON_IMPL.fwd(q, k, k, *band)
        TRITON_IMPL.bwd(q, q, k, k, out, lse, *band, grad_dtype=dtype)
        TRITON_IMPL.choose_blocks(q, k[:, size - 1 :: size], grid.rows, lengths, 3, 0.25)
        TRITON_IMPL.sparse_fwd(q, table, lists, grid.rows, 0.25)
        TRITON_IMPL.sparse_bwd(q, q, table, out, lse, lists, grid.rows, 0.25)
        TRITON_IMPL.local_fwd(q, k, k, *units)
        TRITON_IMPL.local_bwd(q, q, k, k, out, lse, *units)
        # For sm_90 test_machine_code.py compiles units of one token.
        if CAPABILITY == 80:
            TRITON_IMPL.local_fwd(q, k, k, *short)
            TRITON_IMPL.local_bwd(q, q, k, k, out, lse, *short)
    assert len(made) == (20 if CAPABILITY == 80 else 11)
    for each in made:
        assert each.metadata.shared <= SHARED[CAPABILITY], (head_dim, size, each.metadata)
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    test_compiles.compiles([PROGRAM], capability, tmp_path)


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [32, 50, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_good_as_eager_on_a_gpu(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    assert_accurate(1000, (8, 2), head_dim, dtype, block_size=block_size)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lists_on_a_gpu(head_dim: int, block_size: int) -> None:
    qkv = on_device(2000, (8, 2), head_dim, torch.float32)
    dout = torch.randn_like(qkv[0])
    more = {"block_size": block_size, "top_k": 3, "select_tokens": 300}
    assert_close(by_kernel(qkv, dout, **more), truth_of(qkv, dout, **more), FP32)


@pytest.mark.gpu
@pytest.mark.parametrize("choice", [{}, {"top_k": 8, "select_tokens": 500}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_twice(dtype: torch.dtype, choice: dict[str, Any]) -> None:
    qkv = on_device(3000, (8, 2), 64, dtype)
    dout = torch.randn_like(qkv[0])
    more = {"block_size": 32, "cu_seqlens": borders(3000), **choice}
    assert_same_bits(lambda: by_kernel(qkv, dout, **more))


@pytest.mark.gpu
def test_tensors_of_more_than_2_to_the_31_elements() -> None:
    assert_right_behind_2_to_the_31(lambda qkv, dout: by_kernel(qkv, dout, block_size=64))

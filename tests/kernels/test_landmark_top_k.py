"""The kernel that chooses past blocks: its costs, the choice made of them, chunks and shards.

Without a GPU it runs in Triton's interpreter.
"""

import pytest
import torch
from torch import Tensor

from lcdist_kernels.landmark import QueryRows, block_grid, unit_lengths
from lcdist_kernels.landmark import top_k_launch as launch_module
from lcdist_kernels.landmark.top_k import select_least
from lcdist_kernels.landmark.top_k_launch import choose_blocks, least_costs, unit_costs
from lcdist_kernels.triton_common import Launch
from tests.kernels.helpers import HERE, SMALL
from tests.kernels.tiers import tiered

# Rows, block size, unit, (heads, key heads), head_dim, document borders, tiles.
CASES: list[tuple[int, int, int, tuple[int, int], int, list[int], Launch]] = [
    (70, 2, 31, (6, 2), 16, [0], SMALL[1]),
    (80, 2, 80, (4, 1), 20, [0, 41, 60], SMALL[0]),
    (50, 2, 1, (4, 2), 16, [0, 33], SMALL[2]),
    (90, 3, 8, (2, 2), 16, [0], SMALL[0]),
    (150, 2, 40, (8, 1), 48, [0, 1, 2, 149], Launch(64, 64, 4, 1)),
    (66, 64, 5, (3, 1), 16, [0], SMALL[1]),
    (1, 4, 1, (1, 1), 16, [0], SMALL[0]),
]


def problem(
    seqlen: int, size: int, unit: int, heads: tuple[int, int], head_dim: int, borders: list[int]
) -> tuple[Tensor, Tensor, QueryRows, Tensor]:
    """Return random q and landmarks, the rows and the units' lengths."""
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    grid, index = block_grid(cu_seqlens, seqlen, size), torch.arange(seqlen)
    starts = cu_seqlens.long()[torch.searchsorted(cu_seqlens, index, right=True) - 1]
    q = torch.randn(2, seqlen, heads[0], head_dim, device=HERE)
    k = torch.randn(2, grid.num_slots // size, heads[1], head_dim, device=HERE)
    return q, k, grid.rows, unit_lengths(index, starts, unit)


def true_costs(q: Tensor, k: Tensor, rows: QueryRows, lengths: Tensor, scale: float) -> Tensor:
    """Return the costs in float64, line by line as they are defined."""
    q, k = q.cpu().double(), k.cpu().double()
    group, blocks = q.shape[2] // k.shape[2], torch.arange(k.shape[1])
    scores = torch.einsum("bskgd,bnkd->bksgn", q.unflatten(2, (-1, group)), k) * scale
    first, stop = rows.lo // rows.block_size, rows.idx // rows.block_size
    past = (blocks >= first[:, None]) & (blocks < stop[:, None])
    costs = 1 - scores.masked_fill(~past[:, None], -torch.inf).log_softmax(-1)
    costs = costs.masked_fill(~past[:, None], torch.inf).amin(3)
    return torch.stack([x.amin(2) for x in costs.split(lengths.tolist(), 2)], 2)


@pytest.mark.parametrize(
    ("seqlen", "size", "unit", "heads", "head_dim", "borders", "launch"),
    tiered(CASES, {0, 1, 2, 4, 6}),
)
def test_costs_and_choice(
    seqlen: int,
    size: int,
    unit: int,
    heads: tuple[int, int],
    head_dim: int,
    borders: list[int],
    launch: Launch,
) -> None:
    one = problem(seqlen, size, unit, heads, head_dim, borders)
    every = slice(0, len(one[3]))
    costs = unit_costs(*one, 0.7, every, launch).cpu()
    truth = true_costs(*one, 0.7)
    assert torch.equal(costs == torch.inf, truth == torch.inf)
    torch.testing.assert_close(costs.double(), truth, rtol=2e-6, atol=2e-5)
    # Blocks in the order of their costs, equal ones by number; the first three of them, sorted.
    chosen = choose_blocks(*one, 3, 0.7, launch=launch).cpu()
    for cost, blocks in zip(costs.flatten(0, 2), chosen.flatten(0, 2), strict=True):
        order = sorted((c, n) for n, c in enumerate(cost.tolist()) if c < torch.inf)
        expected = sorted(n for _, n in order[: len(blocks)])
        assert blocks.tolist() == expected + [-1] * (len(blocks) - len(expected))


@pytest.mark.parametrize(("blocks", "width"), [(1, 1), (37, 5), (64, 64), (300, 17)])
def test_least_costs(blocks: int, width: int) -> None:
    costs = torch.rand(2, 3, 11, blocks, device=HERE) * 10.0 ** torch.randint(-38, 38, (blocks,))
    # Equal costs, few finite ones, none.
    costs[:, 0] = costs[:, 0, :, :1] + torch.randint(3, costs[:, 0].shape, device=HERE)
    costs[:, 1, :, 3:], costs[0, 2, 4] = torch.inf, torch.inf
    costs[1, 2, 5] = 1.0
    assert torch.equal(least_costs(costs, width), select_least(costs, width))


def test_equal_landmarks_cost_a_row_the_same() -> None:
    q, k, rows, lengths = problem(60, 2, 1, (2, 1), 16, [0])
    k[:, 1::2] = k[:, ::2]
    pairs = unit_costs(q, k, rows, lengths, 0.3, slice(0, 60), SMALL[0]).unflatten(3, (-1, 2))
    past = torch.isfinite(pairs).all(-1)
    assert past.any() and torch.equal(pairs[past][:, 0], pairs[past][:, 1])


@pytest.mark.parametrize("unit", [1, 12])
def test_chunks_and_shards_make_the_same_choice(unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, rows, lengths = problem(48, 2, unit, (4, 2), 16, [0])
    every = slice(0, len(lengths))
    whole = unit_costs(q, k, rows, lengths, 0.3, every)
    for start in (0, 12, 24):
        mine = slice(start, start + 24)
        part = (q[:, mine], k, rows.part(mine.start, mine.stop), lengths[: 24 // unit])
        got = unit_costs(*part, 0.3, slice(0, 24 // unit))
        assert torch.equal(got, whole[:, :, start // unit : mine.stop // unit])
    chosen = choose_blocks(q, k, rows, lengths, 5, 0.3)
    # Two units at once, of 24 landmarks for two rows of the batch and two key heads.
    monkeypatch.setattr(launch_module, "COSTS_AT_ONCE", 2 * 24 * 4 + 1)
    assert torch.equal(choose_blocks(q, k, rows, lengths, 5, 0.3), chosen)


def test_no_rows_and_no_blocks() -> None:
    q, k, rows, lengths = problem(12, 4, 4, (2, 1), 16, [0])
    none = choose_blocks(q[:, :0], k, rows.part(0, 0), lengths[:0], 2, 1.0)
    assert none.shape == (2, 1, 0, 2) and none.dtype == torch.int32
    assert choose_blocks(q, k[:, :0], rows, lengths, 2, 1.0).shape == (2, 1, 3, 0)

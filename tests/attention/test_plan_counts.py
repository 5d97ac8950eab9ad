"""Counts of a plan in closed form equal those of lists of tokens."""

import random

import pytest
import torch

from lcdist.attention.landmark.plan import flops
from lcdist.attention.scca.shift_plan import _joined_spans, _merge_spans
from lcdist.attention.scca.units import count_of_residue, most_of_a_residue
from lcdist.attention.shape import Shape
from lcdist.config.schema import LandmarkOptions
from lcdist.layout import ContextLayout
from lcdist_kernels.scca import Rule
from lcdist_kernels.tensorized import ModeGrid, branch_pairs

DRAW = random.Random(0)


@pytest.mark.parametrize("kind", ["chunk", "fold", "split", "pair", "key"])
def test_pairs_of_a_rule(kind: str) -> None:
    for _ in range(150):
        size, seqlen = DRAW.randrange(1, 9), DRAW.randrange(1, 60)
        shift = DRAW.randrange(size) if kind in ("pair", "key") else DRAW.randrange(40)
        # A folded rule is shifted by whole chunks.
        rule = Rule(kind, size, shift // size * size if kind == "fold" else shift)
        i, j = torch.arange(seqlen)[:, None], torch.arange(seqlen)
        assert rule.pairs(seqlen) == int(rule.mask(i, j).sum()), (rule, seqlen)


def test_pairs_of_branches() -> None:
    for _ in range(200):
        modes = tuple(DRAW.randrange(1, 5) for _ in range(DRAW.randrange(4)))
        blocks, seqlen = DRAW.randrange(1, 5) if len(modes) == 1 else 1, DRAW.randrange(1, 80)
        grid, offset = ModeGrid(modes, blocks), torch.arange(seqlen)
        first = (offset // modes[0] - blocks + 1) * modes[0] if modes else 0 * offset
        pairs = offset - first.clamp(min=0) + 1
        for mode in range(1, len(modes) + 1):
            pairs = pairs + (grid.digit(offset, mode) - blocks + 1).clamp(min=0)
        assert branch_pairs(grid, seqlen) == int(pairs.sum()), (modes, blocks, seqlen)


def test_operations_of_landmarks() -> None:
    for _ in range(200):
        size, seqlen = DRAW.randrange(2, 8), DRAW.randrange(1, 70)
        top_k, count = DRAW.choice([None, 1, 2, 5]), 0
        for block in range(-(-seqlen // size)):
            rows = min(size, seqlen - block * size)
            read = block if top_k is None else min(block, top_k)
            count += rows * (rows + 1) - 2 * (rows == size) + rows * read * (2 * size - 1)
            count += 0 if top_k is None else rows * block
        options = LandmarkOptions(block_size=size, top_k=top_k)
        assert flops(options, Shape(1, 1, 1, 1, 4, seqlen)) == 2 * count, (options, seqlen)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("cp_size", [1, 2, 3, 8])
def test_spans_of_a_layout(kind: str, cp_size: int) -> None:
    layout = ContextLayout(kind, 48, cp_size)
    for rank in range(cp_size):
        spans, positions = layout.spans(rank), layout.positions(rank)
        assert [n for span in spans for n in range(*span)] == positions.tolist()
        assert all(a[1] < b[0] for a, b in zip(spans, spans[1:], strict=False))
        for dilation in (1, 2, 5, 7, 60):
            counts = (positions % dilation).bincount(minlength=dilation)
            found = [count_of_residue(spans, residue, dilation) for residue in range(dilation)]
            assert found == counts.tolist() and most_of_a_residue(spans, dilation) == counts.max()


def test_joined_spans_are_merged_spans() -> None:
    for _ in range(100):
        starts = torch.tensor([DRAW.randrange(50) for _ in range(DRAW.randrange(9))]).long()
        stops = starts + torch.tensor([DRAW.randrange(-2, 9) for _ in starts]).long()
        spans = list(zip(starts.tolist(), stops.tolist(), strict=True))
        assert _joined_spans(starts, stops) == _merge_spans(spans)

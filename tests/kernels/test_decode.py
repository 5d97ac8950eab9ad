"""Decode kernels against the dense reference in float64: rows, strides, splits, empty rows."""

import pytest
import torch
from torch import Tensor

from lcdist_kernels.decode import (
    decode_blocks,
    decode_blocks_reference,
    decode_fwd,
    decode_reference,
    launch,
)
from tests.kernels.helpers import FP32, HERE, assert_close
from tests.kernels.tiers import covering, one
from tests.tolerance import assert_as_good_as_eager


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [x.cpu().double() for x in tensors]


def cache(heads: tuple[int, int, int], head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Return q, k and u with NaN where no query reads."""
    nheads, nheads_k, nheads_u = heads
    q = torch.randn(3, nheads, head_dim, device=HERE, dtype=dtype)
    k, u = (
        torch.randn(4, 320, n, head_dim, device=HERE, dtype=dtype) for n in (nheads_k, nheads_u)
    )
    for x in (k, u):
        x[2] = torch.nan
    return [q, k, u]


def check(got: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    empty = truth[1] == -torch.inf
    assert torch.equal(got[1].cpu() == -torch.inf, empty)
    assert_close(
        [got[0], got[1].cpu().masked_fill(empty, 0)],
        [truth[0], truth[1].masked_fill(empty, 0)],
        FP32,
    )


@pytest.mark.parametrize(
    ("heads", "head_dim", "counts", "step"),
    covering(
        one([(4, 2, 2), (8, 1, 1), (6, 3, 6), (8, 2, 4), (40, 2, 2)]),
        one([16, 18, 80, 128]),
        one([(1, 320, 31), (160, 64, 0), (7, 7, 7)]),
        one([1, 2]),
    ),
)
def test_rows_of_any_length(
    heads: tuple[int, int, int], head_dim: int, counts: tuple[int, ...], step: int
) -> None:
    q, k, u = cache(heads, head_dim, torch.float32)
    counts = tuple(count // step for count in counts)
    spans = [(row, step // 2, count) for row, count in zip((3, 0, 1), counts, strict=True)]
    truth = decode_reference(*doubles(q, k, u), spans, 0.3, step)
    check(decode_fwd(q, k, u, spans, 0.3, step), truth)


def test_any_number_of_splits_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, u = cache((4, 2, 2), 16, torch.float32)
    spans = [(0, 0, 320), (1, 0, 130), (3, 5, 0)]
    truth = decode_reference(*doubles(q, k, u), spans, 0.3)
    for programs, splits in ((1, 1), (12, 2), (264, 5)):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        assert launch._splits(320, launch._entries(q), 6)[0] == splits
        check(decode_fwd(q, k, u, spans, 0.3), truth)


def test_half_precision_is_as_good_as_eager() -> None:
    q, k, u = cache((8, 2, 2), 64, torch.bfloat16)
    spans = [(0, 0, 320), (1, 0, 77), (3, 0, 200)]
    truth = decode_reference(*doubles(q, k, u), spans, 0.125)
    out, _ = decode_fwd(q, k, u, spans, 0.125)
    eager = torch.nn.functional.scaled_dot_product_attention(
        q[:1, :, None], k[:1].transpose(1, 2), u[:1].transpose(1, 2), scale=0.125, enable_gqa=True
    )
    assert_as_good_as_eager(out[:1].cpu(), eager[:, :, 0].cpu(), truth[0][:1])


@pytest.mark.parametrize(
    ("size", "heads", "head_dim", "listed"),
    covering(one([2, 5, 64, 100]), one([(4, 2), (8, 1)]), one([16, 80]), one([1, 3, 9])),
)
def test_listed_blocks(size: int, heads: tuple[int, int], head_dim: int, listed: int) -> None:
    q = torch.randn(3, heads[0], head_dim, device=HERE)
    table = torch.randn(12, 2, size, head_dim, device=HERE)
    ids = torch.randint(-1, 11, (3, heads[1], listed), dtype=torch.int32)
    ids[1] = -1
    table[11] = torch.nan
    truth = decode_blocks_reference(*doubles(q, table), ids, 0.3)
    check(decode_blocks(q, table, ids.to(HERE), 0.3), truth)

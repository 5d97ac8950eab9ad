"""Normal numbers by counter: Philox's test vectors, the kernel, shards of one matrix, moments."""

import math

import pytest
import torch
from torch import Tensor

from lcdist_kernels.normal import Shard, normal_, normal_reference
from lcdist_kernels.normal.op import element_numbers
from lcdist_kernels.normal.reference import philox
from tests.kernels.helpers import HERE

SEED = 0x0123_4567_89AB_CDEF
IMPLS = ("torch", "triton")


def drawn(
    rows: int, columns: int, shard: Shard, impl: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    return normal_(torch.empty(rows, columns, dtype=dtype, device=HERE), shard, SEED, 0.5, impl)


def test_words_are_those_of_philox() -> None:
    """Compare with the known answers of Random123, the first two words of four."""
    zero = philox(torch.zeros(1, dtype=torch.int64), 0)
    assert [x.item() for x in zero] == [0x6627E8D5, 0xE169C58D]
    # Both halves of the index and of the seed count.
    index = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 7])
    words = [philox(index, seed)[0] for seed in (SEED, SEED >> 32, SEED & 0xFFFF_FFFF)]
    assert len(torch.cat(words).unique()) == 3 * len(index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_equals_torch_beyond_32_bits(dtype: torch.dtype) -> None:
    rows, columns = 3, 1100
    # Elements of a matrix with more than 2^32 of them, on both sides of that number.
    shard = Shard(rows, 2**20, 2**18 - 1, 2**14, 2**14 - columns)
    expected = drawn(rows, columns, shard, "torch", torch.float64)
    index = element_numbers(range(rows), columns, shard, torch.device(HERE))
    assert index.min() < 2**32 <= index.max()
    assert torch.equal(expected, 0.5 * normal_reference(index, SEED).double())
    found = drawn(rows, columns, shard, "triton", dtype).double()
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_shards_are_slices_of_the_whole(impl: str) -> None:
    parts, rows, columns, tp_size = 2, 6, 20, 2
    whole = drawn(parts * rows, columns, Shard(rows, rows, 0, columns), impl)
    assert not whole.isnan().any() and len(whole.unique()) == whole.numel()
    for rank in range(tp_size):
        mine = rows // tp_size
        shard = drawn(parts * mine, columns, Shard(mine, rows, mine * rank, columns), impl)
        stacked = [part.chunk(tp_size)[rank] for part in whole.chunk(parts)]
        assert torch.equal(shard, torch.cat(stacked))
        half = columns // tp_size
        shard = drawn(parts * rows, half, Shard(rows, rows, 0, columns, half * rank), impl)
        assert torch.equal(shard, whole.chunk(tp_size, 1)[rank])


def test_numbers_are_normal() -> None:
    count = 2**18
    x = normal_reference(torch.arange(count), SEED).double()
    error = 1 / math.sqrt(count)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean() - moment) < 4 * error * math.sqrt(spread)
    for least in (1.0, 2.0, 3.0):
        share = math.erfc(least / math.sqrt(2))
        assert abs((x.abs() > least).double().mean() - share) < 4 * error * math.sqrt(share)
    # Neighbours, and the same elements of another seed, know nothing of each other.
    other = normal_reference(torch.arange(count), SEED + 1).double()
    assert max(abs((x[1:] * x[:-1]).mean()), abs((x * other).mean())) < 4 * error


def test_a_matrix_is_asked_for() -> None:
    with pytest.raises(ValueError, match="expected a contiguous matrix"):
        normal_(torch.empty(4, 6).t(), Shard(6, 6, 0, 4), 1, 1.0)
    assert normal_(torch.empty(0, 6), Shard(1, 1, 0, 6), 1, 1.0).numel() == 0

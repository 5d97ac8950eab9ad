"""The merge of two partials by a kernel: against torch in float64, and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from lcdist_kernels.merge_kernel import merge_visit
from lcdist_kernels.partial import merge
from tests.kernels.helpers import HERE, assert_close, in_nan
from tests.kernels.tiers import covering, one


def partial_of(seqlen: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a partial in which every fifth row of a head saw nothing."""
    out = torch.randn(2, seqlen, 3, head_dim, device=HERE, dtype=dtype)
    lse = 5 * torch.randn(2, 3, seqlen, device=HERE)
    empty = torch.arange(seqlen, device=HERE) % 5 == 2
    lse[:, 1] = lse[:, 1].masked_fill(empty, -torch.inf)
    out[:, :, 1] = out[:, :, 1].masked_fill(empty[None, :, None], 0)
    return out, lse


@pytest.mark.parametrize(
    ("seqlen", "head_dim", "dtypes"),
    covering(
        one([1, 32, 75]),
        one([16, 18, 80]),
        one([(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.float16)]),
    ),
)
def test_equals_torch(seqlen: int, head_dim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    first, second = (partial_of(seqlen, head_dim, dtype) for dtype in dtypes)
    truth = merge(*(x.double() for x in (*first, *second)))
    kept = [x.clone() for x in second]
    second = (in_nan(second[0]), second[1])
    out, lse = merge_visit(first, second, by_kernel=True)
    assert out.dtype == lse.dtype == torch.float32
    empty = truth[1] == -torch.inf
    assert torch.equal(lse == -torch.inf, empty) and empty.any() == (seqlen > 2)
    assert torch.all(out.transpose(1, 2)[empty] == 0)
    assert_close([out, lse.masked_fill(empty, 0)], [truth[0], truth[1].masked_fill(empty, 0)], 1e-6)
    # The first partial's memory is used again, the second is only read.
    assert (out.data_ptr() == first[0].data_ptr()) == (dtypes[0] == torch.float32)
    assert all(map(torch.equal, second, kept))


def test_what_the_kernel_does_not_take_is_merged_by_torch() -> None:
    first, second = (partial_of(20, 16, torch.float32) for _ in range(2))
    assert merge_visit(None, second, by_kernel=True) is second
    wide = [tuple(x.double() for x in each) for each in (first, second)]
    truth = merge(*wide[0], *wide[1])
    for by_kernel in (False, True):
        got = merge_visit(wide[0], wide[1], by_kernel=by_kernel)
        assert all(map(torch.equal, got, truth))

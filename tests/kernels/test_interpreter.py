"""Test that `tests.interpreter` makes Triton's interpreter round to bf16 as hardware does."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.triton_common import interpreting

pytestmark = pytest.mark.skipif(
    not interpreting(), reason="a GPU compiles kernels; this tests the interpreter"
)


@triton.jit
def _convert_kernel(x, y, z, SIZE: tl.constexpr):
    """Convert fp32 numbers to bf16, and these back to fp32."""
    o = tl.arange(0, SIZE)
    b_y = tl.load(x + o).to(tl.bfloat16)
    tl.store(y + o, b_y)
    tl.store(z + o, b_y.to(tl.float32))


def test_bfloat16_is_rounded_to_nearest() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int64).to(torch.int32)
    bits[:3] = torch.tensor([0x7FFFFFFF, 0x00008000, 0x00018000])
    x = bits.view(torch.float32)
    x[3:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38])
    y, z = torch.empty(4096, dtype=torch.bfloat16), torch.empty_like(x)
    _convert_kernel[(1,)](x, y, z, 4096)

    def known(tensor: Tensor) -> tuple[Tensor, Tensor]:
        return tensor.isnan(), tensor.nan_to_num(7.0, torch.inf, -torch.inf)

    for actual, expected in ((y, x.to(torch.bfloat16)), (z, y.float())):
        for one, other in zip(known(actual), known(expected), strict=True):
            assert torch.equal(one, other)

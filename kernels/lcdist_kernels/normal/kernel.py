"""Normal numbers by Triton's Philox, one program for a tile of a row; formulas in `op.py`."""
# Python's type checkers do not know `tl.constexpr` arguments.
# pyright: reportArgumentType=false, reportCallIssue=false

import triton
import triton.language as tl
from torch import Tensor

from lcdist_kernels.triton_common import launch_context

MOST_COLUMNS, NUM_WARPS = 1024, 4


@triton.jit
def _normal_kernel(
    x, seed, std, width, part_rows, whole_rows, first_row, columns, first_column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Fill a tile of a row of x `[rows, width]`; the other arguments are as in `op.Shard`."""
    i_row = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = (i_row // part_rows).to(tl.int64) * whole_rows + first_row + i_row % part_rows
    # 64 bits: a whole matrix may have more elements than 32 bits count.
    b_x = tl.randn(seed, row * columns + first_column + o_n) * std
    p = x + i_row.to(tl.int64) * width + o_n
    tl.store(p, b_x.to(x.dtype.element_ty), mask=o_n < width)


def fill_(x: Tensor, shard: tuple[int, int, int, int, int], seed: int, std: float) -> Tensor:
    """Fill x `[rows, width]`, contiguous, as `op.normal_` says; return x."""
    rows, width = x.shape
    if x.numel():
        block = min(MOST_COLUMNS, triton.next_power_of_2(width))
        with launch_context(x):
            _normal_kernel[(rows, triton.cdiv(width, block))](
                x, seed, std, width, *shard, BLOCK=block, num_warps=NUM_WARPS
            )
    return x

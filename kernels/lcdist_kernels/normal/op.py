"""Fill a shard of a matrix with normal numbers that depend on the seed and the element alone.

Counter-based, so that a rank draws its own shard and no other: element (i, j) of the whole matrix
has the number i * columns + j, whichever rank holds it, and gets the same value on every mesh.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.normal import kernel
from lcdist_kernels.normal.reference import normal_reference
from lcdist_kernels.rows import use_row_kernels

# Elements that torch draws at a time: some ten int64 tensors of this size.
CHUNK_ELEMENTS = 2**22


class Shard(NamedTuple):
    """Position of a shard `[parts * part_rows, n]` in a matrix `[parts * whole_rows, columns]`.

    The matrix consists of parts stacked by rows, as gate and up are; a shard holds the same rows
    of each part.

    Attributes:
        part_rows: rows of a part in the shard.
        whole_rows: rows of a part in the whole matrix.
        first_row: first row of the shard in a part.
        columns: columns of the whole matrix.
        first_column: first column of the shard.
    """

    part_rows: int
    whole_rows: int
    first_row: int
    columns: int
    first_column: int = 0


def normal_(x: Tensor, shard: Shard, seed: int, std: float, impl: str = "auto") -> Tensor:
    """Fill x with normal numbers of deviation `std`; return x.

    Args:
        x: the shard, contiguous, bf16, fp16, fp32 or float64. Values are drawn in fp32.
        shard: its position in the whole matrix.
        seed: from 0 to 2^63 - 1.
        std: the standard deviation.
        impl: "auto" (a kernel on CUDA below float64), "triton" or "torch".

    Raises:
        ValueError: x is not a contiguous matrix, or kernels do not take it.
    """
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"x of shape {tuple(x.shape)}: expected a contiguous matrix")
    if use_row_kernels(impl, x):
        return kernel.fill_(x, shard, seed, std)
    rows = max(1, CHUNK_ELEMENTS // max(1, x.shape[1]))
    for first in range(0, x.shape[0], rows):
        part = x[first : first + rows]
        index = element_numbers(range(first, first + len(part)), x.shape[1], shard, x.device)
        part.copy_(normal_reference(index, seed).mul_(std))
    return x


def element_numbers(rows: range, columns: int, shard: Shard, device: torch.device) -> Tensor:
    """Return the numbers in the whole matrix of elements in some rows of a shard, int64."""
    row = torch.arange(rows.start, rows.stop, device=device)
    row = row // shard.part_rows * shard.whole_rows + shard.first_row + row % shard.part_rows
    column = shard.first_column + torch.arange(columns, device=device)
    return row[:, None] * shard.columns + column

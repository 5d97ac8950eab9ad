"""Cross-entropy over a shard of the vocabulary in torch, some rows at a time.

Passes over a block of rows stay in the cache, and no fp32 copy of all logits exists.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype

# Logits of a block of rows, which is at least one row: 128 KiB in fp32.
BLOCK_ELEMENTS = 2**15


def stats(logits: Tensor, targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Return lse and picked logits, as `op.stats` says."""
    wide = wide_dtype(logits.dtype)
    lse = torch.empty(len(logits), dtype=wide, device=logits.device)
    for rows in _blocks(logits):
        torch.logsumexp(logits[rows, :real].to(wide), 1, out=lse[rows])
    column, is_here = _columns(targets, first, real)
    picked = logits.gather(1, column[:, None]).squeeze(1).to(wide)
    return lse, picked.masked_fill_(~is_here, 0)


def grad_(
    logits: Tensor, targets: Tensor, lse: Tensor, dout: Tensor, first: int, real: int
) -> None:
    """Overwrite the logits with their gradient, as `op.grad_` says."""
    column, is_here = _columns(targets, first, real)
    hit = is_here.to(lse.dtype).neg_()[:, None]
    for rows in _blocks(logits):
        x = logits[rows, :real]
        dx = torch.sub(x, lse[rows, None], out=x if x.dtype == lse.dtype else None).exp_()
        if real:
            dx.scatter_add_(1, column[rows, None], hit[rows])
        dx.mul_(dout[rows, None])
        if dx is not x:
            x.copy_(dx)
        del dx  # otherwise two blocks are alive during the next iteration
    logits[:, real:] = 0


def _blocks(logits: Tensor) -> Iterator[slice]:
    count = max(1, BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return (slice(start, start + count) for start in range(0, len(logits), count))


def _columns(targets: Tensor, first: int, real: int) -> tuple[Tensor, Tensor]:
    """Return each target's column, 0 where the shard lacks it, and whether it has it; `[t]`."""
    column = targets - first
    is_here = (column >= 0) & (column < real)
    return column.masked_fill_(~is_here, 0), is_here

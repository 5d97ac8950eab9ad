"""swap: all-to-all that trades the sharded dim for another; its adjoint is the opposite swap.

DeepSpeed-Ulysses (arXiv:2309.14509) swaps the sequence for the heads with it.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from lcdist.exchange.debug import Label
from lcdist.exchange.p2p import Group, all_to_all, group_rank, group_size
from lcdist.exchange.pending import Arrival, Pending


def swap(
    x: Tensor,
    shard_dim: int,
    full_dim: int,
    group: Group,
    shard_sizes: Sequence[int] | None = None,
    full_sizes: Sequence[int] | None = None,
) -> Pending:
    """Makes `shard_dim` whole, in rank order, and leaves each rank its part of `full_dim`.

    x: `full_dim` is whole, `shard_dim` is this rank's part. shard_sizes: the ranks' lengths along
    `shard_dim`; None: all as here. full_sizes: how many entries of `full_dim` each rank gets;
    None: equally many. Zeros are legal. Raises ValueError where the sizes do not fit `x`.
    """
    n, me = group_size(group), group_rank(group)
    shard_dim, full_dim = shard_dim % x.dim(), full_dim % x.dim()
    assert shard_dim != full_dim, "swap needs two dims"
    whole, mine = x.shape[full_dim], x.shape[shard_dim]
    if full_sizes is None and whole % n:
        raise ValueError(f"swap: dim {full_dim} has {whole} entries, not a multiple of {n} ranks")
    shards = [mine] * n if shard_sizes is None else list(shard_sizes)
    fulls = [whole // n] * n if full_sizes is None else list(full_sizes)
    if len(shards) != n or shards[me] != mine:
        raise ValueError(f"swap: shard_sizes {shards} on rank {me} of {n}, which holds {mine}")
    if len(fulls) != n or sum(fulls) != whole:
        raise ValueError(f"swap: full_sizes {fulls} for {n} ranks and {whole} entries")
    return Pending(
        x,
        lambda x: _post(x, (shard_dim, full_dim), (shards, fulls), group, "forward"),
        lambda dout: _post(dout, (full_dim, shard_dim), (fulls, shards), group, "backward"),
    )


def _post(
    x: Tensor,
    dims: tuple[int, int],
    sizes: tuple[list[int], list[int]],
    group: Group,
    step: str,
) -> Arrival:
    (shard_dim, full_dim), (shards, fulls), me = dims, sizes, group_rank(group)
    if group_size(group) == 1:
        return lambda: x.detach()
    shape = list(x.shape)
    pieces = [piece.reshape(-1) for piece in x.split(fulls, full_dim)]
    shape[full_dim] = fulls[me]
    shape[shard_dim] = 1
    slab = torch.Size(shape).numel()
    shape[shard_dim] = -1
    common = tuple(-1 if d in dims else size for d, size in enumerate(x.shape))
    label = Label("swap", step, common, x.dtype, f"sizes {shards} {fulls}")
    handle, buffer = all_to_all(group, label, pieces, [length * slab for length in shards])

    def arrive() -> Tensor:
        handle.wait()
        borders = [0, *accumulate(length * slab for length in shards)]
        parts = []
        for length, start, stop in zip(shards, borders, borders[1:], strict=False):
            shape[shard_dim] = length
            parts.append(buffer[start:stop].view(shape))
        return torch.cat(parts, shard_dim)

    return arrive

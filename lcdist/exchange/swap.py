"""swap: all-to-all that makes the sharded dim whole and shards another; its adjoint is the inverse.

DeepSpeed-Ulysses (arXiv:2309.14509) uses it to trade the sequence for the heads.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lcdist.exchange.debug import Label
from lcdist.exchange.p2p import Group, all_to_all, group_rank, group_size
from lcdist.exchange.pending import Pending, WaitFn


def swap(
    x: Tensor,
    shard_dim: int,
    full_dim: int,
    group: Group,
    shard_sizes: Sequence[int] | None = None,
    full_sizes: Sequence[int] | None = None,
) -> Pending:
    """Make `shard_dim` whole, in rank order, and leave each rank its part of `full_dim`.

    Args:
        x: this rank's part along `shard_dim`, whole along `full_dim`.
        shard_dim: dimension that is sharded before and whole after.
        full_dim: dimension that is whole before and sharded after.
        group: context-parallel group.
        shard_sizes: all ranks' sizes along `shard_dim`, possibly 0; None: all as on this rank.
        full_sizes: entries of `full_dim` that each rank gets, possibly 0; None: equal parts.

    Raises:
        ValueError: the sizes do not fit `x`.
    """
    n, rank = group_size(group), group_rank(group)
    shard_dim, full_dim = shard_dim % x.dim(), full_dim % x.dim()
    assert shard_dim != full_dim, "swap needs two dims"
    full_size, local_size = x.shape[full_dim], x.shape[shard_dim]
    if full_sizes is None and full_size % n:
        raise ValueError(
            f"swap: dim {full_dim} has {full_size} entries, not a multiple of {n} ranks"
        )
    shards = [local_size] * n if shard_sizes is None else list(shard_sizes)
    fulls = [full_size // n] * n if full_sizes is None else list(full_sizes)
    if len(shards) != n or shards[rank] != local_size:
        raise ValueError(
            f"swap: shard_sizes {shards} on rank {rank} of {n}, which holds {local_size}"
        )
    if len(fulls) != n or sum(fulls) != full_size:
        raise ValueError(f"swap: full_sizes {fulls} for {n} ranks and {full_size} entries")
    return Pending(
        x,
        lambda x: _post_swap(x, (shard_dim, full_dim), (shards, fulls), group, "forward"),
        lambda dout: _post_swap(dout, (full_dim, shard_dim), (fulls, shards), group, "backward"),
    )


def _post_swap(
    x: Tensor,
    dims: tuple[int, int],
    sizes: tuple[list[int], list[int]],
    group: Group,
    step: str,
) -> WaitFn:
    """Post the all-to-all of one direction.

    Args:
        x: tensor that is sharded along dims[0] and whole along dims[1].
        dims: (shard_dim, full_dim).
        sizes: every rank's size along each of `dims`.
        group: context-parallel group.
        step: "forward" or "backward", for the debug label.
    """
    (shard_dim, full_dim), (shards, fulls), rank = dims, sizes, group_rank(group)
    if group_size(group) == 1:
        return lambda: x.detach()
    shape = list(x.shape)
    pieces = [piece.reshape(-1) for piece in x.split(fulls, full_dim)]
    shape[full_dim] = fulls[rank]
    shape[shard_dim] = 1
    row_size = torch.Size(shape).numel()
    common = tuple(-1 if d in dims else size for d, size in enumerate(x.shape))
    label = Label("swap", step, common, x.dtype, f"sizes {shards} {fulls}")
    recv_sizes = [length * row_size for length in shards]
    handle, buffer = all_to_all(group, label, pieces, recv_sizes)

    def receive() -> Tensor:
        handle.wait()
        offsets = [0, *accumulate(recv_sizes)]
        parts = []
        for length, (start, stop) in zip(shards, pairwise(offsets), strict=True):
            shape[shard_dim] = length
            parts.append(buffer[start:stop].view(shape))
        return torch.cat(parts, shard_dim)

    return receive

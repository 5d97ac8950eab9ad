"""Tensors of the tiled torch implementations: folded heads, and a band cut into tiles.

Query heads that share a key head are rows of one tile, so keys are never repeated. The keys that a
query sees are a band over token numbers. A tile of scores outside it is skipped; a tile inside it
needs no mask.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lcdist_kernels.common import wide_dtype
from lcdist_kernels.partial import visible

# Fastest on a CPU at 512 to 32k tokens, head_dim 32 to 64, 1 and 2 threads: 256 x 256 scores per
# head, and as many heads at once as fill 2 MiB. Short rows waste less with half the side.
BLOCK = 256
SHORT_BLOCK = 128
SHORT_ROW = 1024
SCORES_AT_ONCE = 8 * BLOCK * BLOCK


class Tile(NamedTuple):
    """Keys [k_start, k_stop) of some queries; hidden: bool mask, None if all are visible."""

    k_start: int
    k_stop: int
    hidden: Tensor | None


def tiles_of_band(
    q_idx: Tensor,
    q_lo: Tensor,
    k_idx: Tensor,
    block_q: int,
    block_k: int,
    device: torch.device,
) -> Iterator[tuple[int, int, list[Tile]]]:
    """Yield (start, stop, tiles): for each tile of queries, the tiles of keys it sees."""
    keys = k_idx.split(block_k)
    least = torch.stack([tile.min() for tile in keys])
    greatest = torch.stack([tile.max() for tile in keys])
    for i, (idx, lo) in enumerate(zip(q_idx.split(block_q), q_lo.split(block_q), strict=True)):
        touched = (least <= idx.max()) & (greatest >= lo.min())
        whole = (greatest <= idx.min()) & (least >= lo.max())
        tiles = []
        for j in touched.nonzero().flatten().tolist():
            hidden = None if whole[j] else ~visible(idx, lo, keys[j]).to(device)
            tiles.append(Tile(j * block_k, j * block_k + len(keys[j]), hidden))
        yield i * block_q, i * block_q + len(idx), tiles


def tile_sides(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """Return queries and keys per tile, and key heads at once, for folded q and k."""
    side = SHORT_BLOCK if max(q.shape[2], k.shape[1]) <= SHORT_ROW else BLOCK
    block_q, block_k = min(max(side // q.shape[1], 1), q.shape[2]), min(side, k.shape[1])
    return block_q, block_k, min(len(q), max(1, SCORES_AT_ONCE // (q.shape[1] * block_q * block_k)))


def fold(x: Tensor, nheads_kv: int) -> Tensor:
    """Fold [b, s, h, d] to [b * h_kv, h / h_kv, s, d], contiguous, at least fp32."""
    view = x.unflatten(2, (nheads_kv, -1)).permute(0, 2, 3, 1, 4)
    folded = torch.empty(view.shape, dtype=wide_dtype(x.dtype), device=x.device)
    return folded.copy_(view).flatten(0, 1)


def unfold(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Unfold [b * h_kv, h / h_kv, s, d] to [b, s, h, d], contiguous."""
    return x.reshape(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2).contiguous()


def view_of(buffer: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return the first elements of a flat buffer as a tensor of `shape`."""
    return buffer[: shape[0] * shape[1] * shape[2]].view(shape)

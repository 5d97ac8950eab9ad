"""Define `LayerCache`, the decoding cache of one layer; each attention method has its own.

New tokens come in calls. A call either continues one row by many tokens (prefill) or several rows
by one token each (decoding). Under context parallelism each rank keeps some of the tokens. In a
long prefill every rank also has only its own part of the new tokens (`sharded`); otherwise all
ranks have all new tokens and do the same work, but for the keys that they read.

Queries travel, keys do not: every rank computes the partial results of all new queries over the
keys that it keeps, and the partials are merged (pass-Q, arXiv:2411.01783). What is sent grows with
the new tokens and not with the context.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lcdist.attention.shape import HeadSlice
from lcdist.exchange import Group, gather, group_rank, group_size, swap
from lcdist_kernels import Rotary
from lcdist_kernels.full import merge


@dataclass(frozen=True)
class CacheSpec:
    """Describe a layer's attention to its cache.

    Attributes:
        options: Options of the layer's method.
        rotary: Rotation of queries and keys, the same for all tokens; None for no rotation.
        softmax_scale: Factor of a score.
        params: Learnable parameters of the method; None if it has none.
        heads: Position of the rank's heads in the model.
        group: Context-parallel group; None for one process.
        impl: Name of the implementation.
        rows: Texts that are continued at once.
        capacity: Greatest number of tokens of a row.
        device_blocks: Blocks of a row and key head that landmark attention with top_k keeps on the
            device, the rest being in host memory; None: all of them on the device.
    """

    options: Any
    rotary: Rotary | None
    softmax_scale: float
    params: Mapping[str, Tensor] | None
    heads: HeadSlice
    group: Group
    impl: str
    rows: int
    capacity: int
    device_blocks: int | None = None

    def held(self, page: int) -> int:
        """Return the most tokens of a row that a rank keeps, where ranks take turns by `page`."""
        ranks = group_size(self.group)
        if ranks == 1:
            return self.capacity
        return min(self.capacity, self.capacity // ranks + 2 * page)


@dataclass(frozen=True)
class NewTokens:
    """Number the tokens of one call. All layers of a forward pass share it.

    Attributes:
        rows: Which rows of the batch they continue.
        starts: Position of each row's first new token.
        count: New tokens of each row, on all ranks together.
        sharded: Whether each context-parallel rank has an equal part of them, in rank order.
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    count: int
    sharded: bool = False

    @cached_property
    def positions(self) -> Tensor:
        """Positions of all new tokens: int64 `[rows, count]` on the CPU."""
        return torch.tensor(self.starts)[:, None] + torch.arange(self.count)

    def own(self, group: Group) -> Tensor:
        """Return the positions of this rank's part: int64 `[rows, own tokens]` on the CPU."""
        if not self.sharded:
            return self.positions
        return self.positions.chunk(group_size(group), 1)[group_rank(group)]


@dataclass
class SwapCount:
    """Count blocks that were read, and those that were copied to the device for it.

    Attributes:
        chosen: Blocks that calls needed, each once a call and key head.
        copied: Those that were not on the device when they were needed.
        posted: Blocks that were copied one layer ahead, because they were expected to be needed.
        bytes_copied: Bytes of both.
    """

    chosen: int = 0
    copied: int = 0
    posted: int = 0
    bytes_copied: int = 0

    @classmethod
    def total(cls, *counts: "SwapCount | None") -> "SwapCount | None":
        """Return the sum of the counts that there are; None of none."""
        known = [astuple(count) for count in counts if count is not None]
        return cls(*map(sum, zip(*known, strict=True))) if known else None


class LayerCache(ABC):
    """Keep one layer's tokens for decoding.

    `attend` adds new tokens and returns their attention over all tokens so far.

    Attributes:
        page: tokens that stay together on one rank. A sharded call gives every rank whole pages.
        swaps: what was copied from host memory; None for a cache that is on the device.
    """

    page = 16
    swaps: SwapCount | None = None

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, new: NewTokens) -> Tensor:
        """Keep new tokens and return their attention, like q.

        Args:
            q: this rank's new tokens, `[rows, n, h, d]`, not rotated.
            k, v: `[rows, n, h_kv, d]`, not rotated.
            new: which tokens these are; each row continues where its last call ended.

        Raises:
            ValueError: more tokens than the cache's capacity.
        """

    @property
    def looks_ahead(self) -> bool:
        """Return whether `expect` and `post` have to be called; False by default."""
        return False

    def expect(self, q: Tensor, new: NewTokens) -> None:
        """Work out what tokens with about these queries will read, without waiting for the device.

        Args:
            q: `[rows, 1, h, d]`, not rotated.
            new: the tokens, one of each row, which the next call of `attend` will get.
        """
        raise NotImplementedError(f"{type(self).__name__} does not look ahead")

    def post(self) -> None:
        """Begin to copy what is expected to be read to the device."""
        raise NotImplementedError(f"{type(self).__name__} does not look ahead")

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the tensors that are kept on the device."""

    def keeps(self, positions: Tensor, new: NewTokens) -> Tensor:
        """Return which of its own new tokens a rank keeps: bool, like `positions`."""
        ranks = group_size(self.spec.group)
        if ranks == 1 or new.sharded:
            return torch.ones_like(positions, dtype=torch.bool)
        return positions // self.page % ranks == group_rank(self.spec.group)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x `[rows, n, h, d]` by positions `[rows, n]`."""
        if self.spec.rotary is None:
            return x
        # Layers find the table of one row's positions again.
        return self.spec.rotary.rotate(x, positions[0] if len(positions) == 1 else positions)


class SoftmaxCache(LayerCache):
    """A cache whose partial results, of softmax, merge over context-parallel ranks."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, new: NewTokens) -> Tensor:
        """Keep new tokens and return their attention; as `LayerCache.attend`."""
        group, own = self.spec.group, new.own(self.spec.group)
        queries = self.queries(q, own)
        self.keep(k, v, own, new)
        queries = gather_rows(queries, new, group)
        out, _ = merge_ranks(*self.partial(queries, new), new, group)
        return out.to(q.dtype)

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """Return what is multiplied with keys, shaped like q; by default q rotated."""
        return self.rotate(q, positions)

    @abstractmethod
    def keep(self, k: Tensor, v: Tensor, positions: Tensor, new: NewTokens) -> None:
        """Keep those of this rank's new tokens that it holds. positions: `[rows, n]`."""

    @abstractmethod
    def partial(self, queries: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Return the partial (out, lse) of all new tokens over what this rank keeps.

        Args:
            queries: `[rows, count, h, d]`, ready to multiply with keys.
            new: which tokens these are.

        Returns:
            out like queries, lse `[rows, h, count]`; both in fp32 or float64.
        """


def gather_rows(x: Tensor, new: NewTokens, group: Group) -> Tensor:
    """Return all ranks' new tokens `[rows, count, h, d]` of this rank's part."""
    return gather(x, group, 1).wait() if new.sharded else x


def merge_ranks(out: Tensor, lse: Tensor, new: NewTokens, group: Group) -> tuple[Tensor, Tensor]:
    """Merge the ranks' partials of all new tokens, in rank order.

    Returns:
        The partial over all ranks' keys: of this rank's part of a sharded call, else of all tokens,
        with the same bits on all ranks.
    """
    if group_size(group) == 1:
        return out, lse
    # One message: lse travels as one more feature.
    whole = torch.cat((out, lse.transpose(1, 2)[..., None]), -1)
    parts = exchange_partials(whole, new, group)
    merged = split_lse(parts[0])
    for part in parts[1:]:
        merged = merge(*merged, *split_lse(part))
    return merged


def exchange_partials(x: Tensor, new: NewTokens, group: Group) -> Tensor:
    """Return every rank's x `[rows, count, ...]` by rank: `[ranks, rows, count or own, ...]`."""
    if new.sharded:
        return swap(x[None].contiguous(), 0, 2, group).wait()
    return gather(x[None].contiguous(), group, 0).wait()


def split_lse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of x `[rows, n, h, d + 1]`."""
    return x[..., :-1], x[..., -1].transpose(1, 2)


def row_calls(new: NewTokens, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield every row's number, its positions `[count]` and its part `[1, ...]` of the tensors."""
    yield from zip(new.rows, new.positions, *(x.split(1) for x in tensors), strict=True)

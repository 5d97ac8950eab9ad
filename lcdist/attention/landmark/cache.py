"""Decoding caches of landmark attention: all blocks read, or the chosen ones (arXiv:2305.16300).

Without top_k every past block is read. With top_k each new token chooses for itself, as with
select_tokens = 1. Then a rank keeps the landmarks' keys of all blocks of the text, a small part,
and the contents of its own blocks in a `BlockTable`, which may lie in host memory. Under context
parallelism all ranks choose alike, and each reads the chosen blocks that it keeps.
"""

import torch
from torch import Tensor

from lcdist.attention.cache import CacheSpec, LayerCache, NewTokens, SoftmaxCache, row_calls
from lcdist.attention.landmark.block_table import BlockTable, HostBlocks
from lcdist.attention.shared.key_value_cache import (
    decode_single,
    decodes_by_kernel,
    join_rows,
    nothing_seen,
    store_tokens,
)
from lcdist.attention.shared.token_store import TokenStore
from lcdist.exchange import gather
from lcdist_kernels.decode import decode_blocks, decode_blocks_reference
from lcdist_kernels.full import merge
from lcdist_kernels.landmark import TORCH_IMPL, LandmarkImpl, select_landmark_impl
from lcdist_kernels.landmark.blocks import QueryRows, landmarks, slots_of
from lcdist_kernels.landmark.sparse import BlockLists


def make_cache(spec: CacheSpec) -> LayerCache:
    """Return the cache that the options need."""
    return AllBlocksCache(spec) if spec.options.top_k is None else ChosenBlocksCache(spec)


class _LandmarkCache(SoftmaxCache):
    """Base of both caches: all tokens of a block are on one rank."""

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        self.page = self.block_size = spec.options.block_size

    def impl_for(self, like: Tensor) -> LandmarkImpl:
        """Return the implementation for queries like `like`."""
        if self.spec.impl in ("torch", "reference"):
            return TORCH_IMPL
        return select_landmark_impl(self.spec.impl, like, "landmark attention over a cache")

    def rows_at(self, positions: Tensor) -> QueryRows:
        """Return the queries of one text at `positions` `[n]`."""
        return QueryRows(positions, torch.zeros_like(positions), self.block_size)


class AllBlocksCache(_LandmarkCache):
    """Keeps rotated keys and values of whole blocks; the open block is padded with zeros."""

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        limit = spec.held(self.page)
        self.store = TokenStore(spec.rows, limit + -limit % self.block_size)

    @property
    def nbytes(self) -> int:
        return self.store.nbytes

    def keep(self, k: Tensor, v: Tensor, positions: Tensor, new: NewTokens) -> None:
        store_tokens(self, self.store, positions, new, self.rotate(k, positions), v)

    def partial(self, queries: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        impl, results, scale = self.impl_for(queries), [], self.spec.softmax_scale
        for row, positions, q in row_calls(new, queries):
            k_start = self.store.positions(row)[:: self.block_size]
            if len(k_start):
                # Slots beyond the last token are zero, and no query sees them.
                stop = len(k_start) * self.block_size
                k, v = (x[row : row + 1, :stop] for x in self.store.buffers)
                results.append(impl.fwd(q, k, v, self.rows_at(positions), k_start, scale))
            else:
                results.append(nothing_seen(q))
        return join_rows(results)


class ChosenBlocksCache(_LandmarkCache):
    """Keeps landmarks' keys of all blocks, the open block, and a table of closed blocks.

    recent: rotated keys and values of the open block, or of the blocks of a call's tokens.
    """

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        blocks = -(-spec.capacity // self.block_size)
        limit = spec.held(self.page)
        self.recent = TokenStore(spec.rows, limit, grows=True)
        self.landmarks = TokenStore(spec.rows, blocks)
        held = -(-limit // self.block_size)
        slots = spec.device_blocks
        self.blocks = (
            BlockTable(spec.rows, held) if slots is None else HostBlocks(spec.rows, held, slots)
        )
        self.swaps = self.blocks.swaps

    @property
    def nbytes(self) -> int:
        return self.recent.nbytes + self.landmarks.nbytes + self.blocks.nbytes

    def keep(self, k: Tensor, v: Tensor, positions: Tensor, new: NewTokens) -> None:
        k = self.rotate(k, positions)
        self._keep_landmarks(k, positions, new)
        store_tokens(self, self.recent, positions, new, k, v)
        for row in new.rows:
            self._close_blocks(row)

    def _keep_landmarks(self, k: Tensor, positions: Tensor, new: NewTokens) -> None:
        """Keep the landmarks' keys among the new tokens of all ranks."""
        size = self.block_size
        if new.sharded:
            # A rank has whole blocks.
            k = gather(landmarks(k, size).contiguous(), self.spec.group, 1).wait()
            positions = new.positions[:, size - 1 :: size]
        for i, row in enumerate(new.rows):
            is_landmark = positions[i] % size == size - 1
            if is_landmark.any():
                index = is_landmark.nonzero().flatten()
                chosen = k[i : i + 1, index.to(k.device)]
                self.landmarks.append(row, positions[i, index] // size, chosen)

    def _close_blocks(self, row: int) -> None:
        """Copy complete blocks that are not in the table yet to it."""
        positions = self.recent.positions(row)
        size = self.block_size
        known = self.blocks.last_number(row)
        fresh = positions // size > known
        whole = len(positions[fresh]) // size * size
        if whole:
            first = len(positions) - int(fresh.sum())
            k, v = (x[:, first : first + whole] for x in self.recent.read(row))
            numbers = positions[first : first + whole : size] // size
            self.blocks.append(row, numbers, k, v)

    def partial(self, queries: Tensor, new: NewTokens) -> tuple[Tensor, Tensor]:
        results = []
        for row, positions, q in row_calls(new, queries):
            rows = self.rows_at(positions)
            part = self._own_blocks(row, rows, q)
            if self.landmarks.length(row):
                part = merge(*part, *self._past_blocks(row, rows, q))
            results.append(part)
            self._forget_closed(row, int(positions[-1]) + 1)
        return join_rows(results)

    @property
    def looks_ahead(self) -> bool:
        return isinstance(self.blocks, HostBlocks)

    def expect(self, q: Tensor, new: NewTokens) -> None:
        if not isinstance(self.blocks, HostBlocks):
            return
        queries = self.queries(q, new.positions)
        for row, positions, one in row_calls(new, queries):
            if self.landmarks.length(row):
                self.blocks.expect(row, self._chosen(row, self.rows_at(positions), one))

    def post(self) -> None:
        if isinstance(self.blocks, HostBlocks):
            self.blocks.post()

    def _own_blocks(self, row: int, rows: QueryRows, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the partial over each query's own block."""
        k_ids = self.recent.positions(row)
        if not len(k_ids):
            return nothing_seen(q)
        if q.shape[1] == 1:
            last, start = (int(x) for x in rows.content)
            k, v = self.recent.read(row)
            span = (0, start - int(k_ids[0]), last - start + 1)
            return decode_single(q, k, v, [span], self.spec.softmax_scale, self.spec.impl)
        k_start = k_ids[:: self.block_size]
        missing = len(slots_of(k_start, self.block_size)) - len(k_ids)
        k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) for x in self.recent.read(row))
        return self.impl_for(q).own_fwd(q, k, v, rows, k_start, self.spec.softmax_scale)

    def _chosen(self, row: int, rows: QueryRows, q: Tensor) -> Tensor:
        """Return the past blocks that each query chooses, int32 `[1, h_kv, queries, K]`."""
        (keys,), scale = self.landmarks.read(row), self.spec.softmax_scale
        lengths, top_k = torch.ones_like(rows.idx), self.spec.options.top_k
        return self.impl_for(q).choose_blocks(q, keys, rows, lengths, top_k, scale)

    def _past_blocks(self, row: int, rows: QueryRows, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return the partial over the past blocks that each query chooses."""
        impl, scale, lengths = self.impl_for(q), self.spec.softmax_scale, torch.ones_like(rows.idx)
        chosen = self._chosen(row, rows, q)
        parts = []
        for start, stop, table, numbers, ids in self.blocks.find(row, chosen):
            if q.shape[1] == 1:
                by_kernel = decodes_by_kernel(self.spec.impl, q)
                decode = decode_blocks if by_kernel else decode_blocks_reference
                out, lse = decode(q[:, 0], table, ids[:, :, 0], scale)
                return out[:, None], lse[..., None]
            lists = BlockLists(numbers, ids, lengths[start:stop])
            part = rows.part(start, stop)
            parts.append(impl.sparse_fwd(q[:, start:stop], table, lists, part, scale))
        if not parts:
            return nothing_seen(q)
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(lses, 2)

    def _forget_closed(self, row: int, stop: int) -> None:
        """Drop recent tokens of blocks that end before position `stop`."""
        kept = self.recent.positions(row) >= stop // self.block_size * self.block_size
        if not kept.all():
            self.recent.retain(row, kept)

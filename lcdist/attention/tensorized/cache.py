"""Decoding cache of tensorized attention: closed blocks of the coarsest mode, and the tail.

The coarsest branch of a token reads the token's own place in every closed block: keys, rotated for
this mode, and U. Unchanged queries, keys and values stay for the last tokens only (`tail.py`).
Under context parallelism closed blocks are spread over the ranks, and every rank has the tail.
"""

from typing import Any

import torch
from torch import Tensor

from lcdist.attention.cache import (
    CacheSpec,
    LayerCache,
    NewTokens,
    gather_rows,
    merge_ranks,
    row_calls,
)
from lcdist.attention.shared.key_value_cache import (
    KeyValueCache,
    decode_single,
    join_rows,
    nothing_seen,
)
from lcdist.attention.shared.token_store import TokenStore
from lcdist.attention.tensorized.branches import grid_and_bias
from lcdist.attention.tensorized.tail import Layer, Tail
from lcdist.exchange import gather, group_rank
from lcdist_kernels import tensorized as ops
from lcdist_kernels.tensorized import ModeGrid, Partial
from lcdist_kernels.tensorized.tiled import Band, softmax_fwd


def make_cache(spec: CacheSpec) -> LayerCache:
    """Return the cache of a layer; without modes the method is full attention."""
    return BlocksCache(spec) if spec.options.modes else KeyValueCache(spec)


class BlocksCache(LayerCache):
    """Keeps closed blocks and, of each row, the tail."""

    def __init__(self, spec: CacheSpec) -> None:
        super().__init__(spec)
        options = spec.options
        # A rank's part of a sharded call has all that the next rank's first block sees.
        self.page = ModeGrid(options.modes).block * max(1, options.local_blocks - 1)
        self.closed = TokenStore(spec.rows, spec.held(self.page))
        self._tails: list[Tail] = []

    @property
    def nbytes(self) -> int:
        return self.closed.nbytes + sum(tail.nbytes for tail in self._tails)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, new: NewTokens) -> Tensor:
        layer = self._layer(q, k)
        if not self._tails:
            self._tails = [Tail(layer, q, k) for _ in range(self.spec.rows)]
        own, last = new.own(self.spec.group), len(layer.grid.modes)
        add = self._add_shard if new.sharded else self._add_row
        parts = [
            add(row, own[i], new, (q[i : i + 1], k[i : i + 1], v[i : i + 1]))
            for i, row in enumerate(new.rows)
        ]
        fine = Partial(*join_rows([(part.out, part.lse) for part in parts]))
        queries = torch.cat(
            [layer.at(at).rotate(x, last) for at, x in zip(own, q.split(1), strict=True)]
        )
        queries = gather_rows(queries, new, self.spec.group)
        coarse = join_rows([self._coarsest(layer, *call) for call in row_calls(new, queries)])
        part = Partial(*merge_ranks(*coarse, new, self.spec.group))
        return ops.merge_branch(fine, part, layer.bias, last).out.to(q.dtype)

    def _layer(self, q: Tensor, k: Tensor) -> Layer:
        spec = self.spec
        grid, bias = grid_and_bias(q, k, spec)
        return Layer(grid, bias, spec.rotary, spec.softmax_scale, spec.impl)

    def _add_row(
        self, row: int, positions: Tensor, new: NewTokens, qkv: tuple[Tensor, Tensor, Tensor]
    ) -> Partial:
        """Add a row's new tokens, all of which this rank has, to its tail."""
        tail = self._tails[row]
        add = tail.add_token if new.count == 1 else tail.add_tokens
        part, closed = add(*qkv)
        if closed is not None:
            here = self.keeps(closed.positions, new)
            if here.any():
                index = here.nonzero().flatten()
                on_device = index.to(closed.k.device)
                k, u = closed.k[:, on_device], closed.u[:, on_device]
                self.closed.append(row, closed.positions[index], k, u)
        return part

    def _add_shard(
        self, row: int, positions: Tensor, new: NewTokens, qkv: tuple[Tensor, Tensor, Tensor]
    ) -> Partial:
        """Add this rank's whole blocks of a row, after those of the ranks before it."""
        tail, group, halo = self._tails[row], self.spec.group, self._tails[row].layer.halo
        q, k, v = qkv
        assert tail.open == tail.stop, "a sharded call begins where a block begins"
        if halo:
            ends = gather(torch.stack((k[:, -halo:], v[:, -halo:]))[None], group, 0).wait()
            if group_rank(group) > 0:
                tail.set_halo(ends[group_rank(group) - 1], int(positions[0]))
        tail.open = tail.stop = int(positions[0])
        part, closed = tail.add_tokens(q, k, v)
        assert closed is not None
        self.closed.append(row, closed.positions, closed.k, closed.u)
        stop = int(new.positions[0, -1]) + 1
        if halo:
            tail.set_halo(ends[-1], stop)
        tail.open = tail.stop = stop
        return part

    def _coarsest(
        self, layer: Layer, row: int, positions: Tensor, q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the partial of new tokens `[1, n, h, d]` over this rank's closed blocks."""
        if not self.closed.length(row):
            return nothing_seen(q)
        block, local = layer.grid.block, layer.grid.local_blocks
        k, u = self.closed.read(row)
        numbers = self.closed.positions(row)[::block] // block
        if len(positions) == 1:
            place = int(positions[0]) % block
            own = positions // block
            span = (0, place, int((numbers <= own - local).sum()))
            return decode_single(q, k, u, [span], layer.scale, self.spec.impl, block)
        before, nheads = int(positions[0]) % block, q.shape[2]
        after = -(before + len(positions)) % block
        padded = torch.nn.functional.pad(q, (0, 0, 0, 0, before, after))
        # The places in a block act as heads.
        parts: Any = [x.reshape(1, -1, block * x.shape[2], x.shape[3]) for x in (padded, k, u)]
        own = int(positions[0]) // block + torch.arange(parts[0].shape[1])
        band = Band(own - local, torch.zeros_like(own), numbers)
        out, lse = softmax_fwd(parts, band, layer.scale)
        # [1, block x h, blocks] -> [1, h, n]
        lse = lse.unflatten(1, (block, nheads)).permute(0, 2, 3, 1).flatten(2)
        new = slice(before, before + len(positions))
        return out.reshape(padded.shape)[:, new], lse[:, :, new]

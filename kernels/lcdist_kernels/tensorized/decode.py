"""Tensorized attention of new tokens over a cache, and the state kept for closed blocks.

A token reads only its fibres: for branch j the keys of earlier digits and their U_{j-1}, sum_j n_j
rows in all. When a block of s_{j+1} tokens closes, its U_j replaces its U_{j-1}, so one value row
per token and hop head is kept. The hop needs the block's queries, which are kept until the block of
the coarsest mode closes. Keys and v stay in the cache.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist_kernels.tensorized.tiled import (
    Band,
    ModeRotary,
    Partial,
    branch_fwd,
    fine_branch,
    hop_fwd,
    merge_branch,
    softmax_fwd,
)


def decode_step(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    bias: Tensor,
    mode_rotary: ModeRotary,
    state: dict[str, Any],
) -> Tensor:
    """Return attention of new tokens over the cache, shaped like q `[b, n, h, d]`.

    Args:
        q: new tokens at `mode_rotary.positions`, which continue where `state` ends.
        k_cache, v_cache: `[b, s_cache, h_kv, d]`, not rotated, the new tokens' entries included.
        bias: `[len(modes), h]`, in the wider of fp32 and q.dtype.
        state: empty at the start. seen: tokens so far. queries `[b, block, h, d]`: those of the
            open block first. hops `[b, capacity, h_u, d]`: the U of closed blocks.

    Raises:
        ValueError: positions do not continue the state or exceed the cache, or the batch differs.
    """
    start, stop = _span(q, k_cache, mode_rotary.positions, state)
    if not mode_rotary.grid.modes:
        whole = dataclasses.replace(mode_rotary, positions=torch.arange(stop))
        band = Band(torch.arange(start, stop), torch.zeros(stop - start).long(), torch.arange(stop))
        k = whole.rotate(k_cache[:, :stop], 0)
        qku = (mode_rotary.rotate(q, 0), k, v_cache[:, :stop])
        part = softmax_fwd(qku, band, mode_rotary.softmax_scale)
        state["seen"] = stop
        return part.out.to(q.dtype)
    tokens = _NewTokens(q, k_cache, v_cache, bias, mode_rotary, state, start, stop)
    out = tokens.decode_token() if stop - start == 1 else tokens.decode_tokens()
    state["seen"] = stop
    return out.to(q.dtype)


def _span(q: Tensor, k_cache: Tensor, positions: Tensor, state: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of the first new token and of the one after the last."""
    start = state.get("seen", 0)
    stop = start + q.shape[1]
    if positions.shape != q.shape[1:2] or positions.tolist() != list(range(start, stop)):
        raise ValueError(
            f"positions = {positions.tolist()}: the state has seen {start} tokens, so the next "
            f"{q.shape[1]} stand at {start} to {stop - 1}, the same in every row"
        )
    if stop > k_cache.shape[1]:
        raise ValueError(
            f"positions from {start} to {stop - 1}: the cache has entries 0 to "
            f"{k_cache.shape[1] - 1}"
        )
    if "queries" in state and len(state["queries"]) != len(q):
        raise ValueError(
            f"q has {len(q)} rows, the state {len(state['queries'])}: start with an empty state"
        )
    return start, stop


class _NewTokens:
    """New tokens start..stop of a layer, and its caches."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mode_rotary: ModeRotary,
        state: dict[str, Any], start: int, stop: int,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.bias = q, k[:, :stop], v[:, :stop], bias
        self.mode_rotary, self.grid, self.state = mode_rotary, mode_rotary.grid, state
        self.start, self.stop = start, stop
        self.scale = mode_rotary.softmax_scale
        # First token of the coarsest mode's open block.
        self.open = start - start % self.grid.block
        if "queries" not in state:
            state["queries"] = q.new_zeros(len(q), self.grid.block, *q.shape[2:])
        self.queries, self.hops = state["queries"], self._hop_cache(k.shape[1])

    def _hop_cache(self, capacity: int) -> Tensor:
        """Return the state's cache of U, grown to `capacity` tokens."""
        nheads = self.q.shape[2] if self.grid.hop_heads == "q" else self.k.shape[2]
        shape = (len(self.q), capacity, nheads, self.q.shape[3])
        hops = self.state.get("hops")
        if hops is None or hops.shape[1] < capacity:
            grown = self.v.new_zeros(shape)
            if hops is not None:
                grown[:, : hops.shape[1]] = hops
            hops = self.state["hops"] = grown
        return hops

    def _rotary_at(self, rows: range) -> ModeRotary:
        """Return the rotation of the tokens `rows`."""
        return dataclasses.replace(
            self.mode_rotary, positions=torch.arange(rows.start, rows.stop, rows.step)
        )

    def decode_token(self) -> Tensor:
        """Return attention of one token, fibre by fibre."""
        t, grid = self.start, self.grid
        self.queries[:, t - self.open] = self.q[:, 0]
        partial = None
        for mode in range(len(grid.modes) + 1):
            rows = self._fibre(t, mode)
            if not len(rows):
                continue
            tokens = slice(rows.start, rows.stop, rows.step)
            k = self._rotary_at(rows).rotate(self.k[:, tokens], mode)
            u = (self.hops if mode else self.v)[:, tokens]
            last = torch.tensor([len(rows) - 1])
            band = Band(last, torch.zeros_like(last), torch.arange(len(rows)))
            part = softmax_fwd((self.mode_rotary.rotate(self.q, mode), k, u), band, self.scale)
            partial = merge_branch(partial, part, self.bias, mode)
        for mode in range(len(grid.modes)):
            if self.stop % grid.strides[mode + 1] == 0:
                first = self.stop - grid.strides[mode + 1]
                u = (self.hops if mode else self.v)[:, first : self.stop]
                self.hops[:, first : self.stop] = self._hop(u, range(first, self.stop), mode)
        assert partial is not None, "a token always sees itself"
        return partial.out

    def _fibre(self, t: int, mode: int) -> range:
        """Return the tokens whose keys branch `mode` of token t reads."""
        grid = self.grid
        stride = grid.strides[mode]
        if mode == 0:
            first = max(0, (t // grid.modes[0] - grid.local_blocks + 1) * grid.modes[0])
            return range(first, t + 1)
        outer = grid.strides[mode + 1] if mode < len(grid.modes) else t + 1
        first = t - t % outer + t % stride
        count = (t - first) // stride - grid.local_blocks + 1
        return range(first, first + max(0, count) * stride, stride)

    def _hop(self, u: Tensor, rows: range, mode: int) -> Tensor:
        """Return U_{mode + 1} of a closed block."""
        mode_rotary = self._rotary_at(rows)
        tokens = slice(rows.start, rows.stop)
        q = self.queries[:, rows.start - self.open : rows.stop - self.open]
        return hop_fwd(
            mode_rotary.rotate(q, mode),
            mode_rotary.rotate(self.k[:, tokens], mode),
            u,
            mode,
            mode_rotary,
        )[0]

    def decode_tokens(self) -> Tensor:
        """Return attention of several tokens: padded whole blocks from the open one on."""
        grid, first = self.grid, self.open
        end = self.stop + -self.stop % grid.block
        rows = range(first, end)
        queries = torch.cat((self.queries[:, : self.start - first], self.q), 1)
        rest = self.stop % grid.block
        self.queries[:, :rest] = queries[:, queries.shape[1] - rest :]
        q, k = self._pad(queries, end - first), self._pad(self.k, end)
        values, partial, mode_rotary = (
            [self._pad(self.v, end)[:, first:]],
            None,
            self._rotary_at(rows),
        )
        for mode in range(len(grid.modes)):
            q_mode, own = mode_rotary.rotate(q, mode), mode_rotary.rotate(k[:, first:], mode)
            part = self._fine_branch(q_mode, own, values[-1], mode, rows)
            partial = merge_branch(partial, part, self.bias, mode)
            values.append(hop_fwd(q_mode, own, values[-1], mode, mode_rotary)[0])
        last = len(grid.modes)
        part = self._coarsest_branch(mode_rotary.rotate(q, last), k, values[-1], rows)
        partial = merge_branch(partial, part, self.bias, last)
        for mode, u in enumerate(values[1:]):
            closed = self.stop - self.stop % grid.strides[mode + 1]
            if closed > first:
                self.hops[:, first:closed] = u[:, : closed - first]
        return partial.out[:, self.start - first : self.stop - first]

    def _pad(self, x: Tensor, length: int) -> Tensor:
        """Pad x with zeros to `length` tokens."""
        return F.pad(x, (0, 0, 0, 0, 0, length - x.shape[1]))

    def _fine_branch(self, q: Tensor, k: Tensor, u: Tensor, mode: int, rows: range) -> Partial:
        """Return the partial of branch `mode`, not the coarsest."""
        before = 0
        if mode == 0:
            before = min(rows.start, (self.grid.local_blocks - 1) * self.grid.modes[0])
        keys = range(rows.start - before, rows.stop)
        if before:
            halo = slice(keys.start, rows.start)
            k = torch.cat((self._rotary_at(keys[:before]).rotate(self.k[:, halo], mode), k), 1)
            u = torch.cat((self.v[:, halo], u), 1)
        index, k_idx = torch.arange(rows.start, rows.stop), torch.arange(keys.start, keys.stop)
        branch = fine_branch(mode, index, torch.zeros_like(index), k_idx, self.grid)
        return branch_fwd((q, k, u), branch, self.scale)

    def _coarsest_branch(self, q: Tensor, k: Tensor, u: Tensor, rows: range) -> Partial:
        """Return the partial of blocks `rows` over all blocks, whose offsets act as heads."""
        block, nheads = self.grid.block, self.q.shape[2]
        k = self._rotary_at(range(rows.stop)).rotate(k, len(self.grid.modes))
        u = torch.cat((self.hops[:, : rows.start], u), 1)
        parts = [x.reshape(len(x), -1, block * x.shape[2], x.shape[3]) for x in (q, k, u)]
        blocks = torch.arange(rows.stop // block)
        own = blocks[rows.start // block :]
        band = Band(own - self.grid.local_blocks, torch.zeros_like(own), blocks)
        out, lse = softmax_fwd(parts, band, self.scale)
        # [b, block x h, blocks] -> [b, h, s]
        lse = lse.unflatten(1, (block, nheads)).permute(0, 2, 3, 1).flatten(2)
        return Partial(out.reshape(q.shape), lse)

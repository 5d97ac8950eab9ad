"""The last tokens of a text: those of the open block, and of the blocks that it sees locally.

The branches of all modes but the coarsest read these tokens alone. For the formulas see
`lcdist_kernels.tensorized.reference`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lcdist.attention.shared.key_value_cache import decode_single
from lcdist_kernels import Rotary
from lcdist_kernels import tensorized as ops
from lcdist_kernels.tensorized import ModeGrid, ModeRotary, Partial
from lcdist_kernels.tensorized.tiled import branch_fwd, hop_fwd


class Layer(NamedTuple):
    """Hold what a layer needs for every row. bias: `[len(modes), h]`; scale: factor of a score."""

    grid: ModeGrid
    bias: Tensor
    rotary: Rotary | None
    scale: float
    impl: str

    def at(self, positions: Tensor) -> ModeRotary:
        """Return the rotation of tokens at `positions`."""
        return ModeRotary(self.grid, self.rotary, positions, self.scale)

    @property
    def halo(self) -> int:
        """Tokens before a block that its finest branch sees."""
        return (self.grid.local_blocks - 1) * self.grid.modes[0]


class Closed(NamedTuple):
    """Blocks that are complete: keys rotated for the coarsest mode, and its values U.

    positions: int64 `[n]`, whole blocks. k `[1, n, h_kv, d]`. u `[1, n, h_u, d]`.
    """

    positions: Tensor
    k: Tensor
    u: Tensor


class Tail:
    """The last tokens of one row.

    open: position of the open block's first token. stop: position after the last token.
    The tensors hold tokens from `open - halo` on, those before the text's start being unused.
    """

    def __init__(self, layer: Layer, q: Tensor, k: Tensor) -> None:
        self.layer, self.open, self.stop = layer, 0, 0
        room = layer.halo + layer.grid.block
        nheads_u = q.shape[2] if layer.grid.hop_heads == "q" else k.shape[2]
        self.q = q.new_zeros(1, layer.grid.block, *q.shape[2:])
        self.k, self.v = (k.new_zeros(1, room, *k.shape[2:]) for _ in range(2))
        # U of the open block's closed fibres: of the coarsest mode that has closed.
        self.hops = k.new_zeros(1, layer.grid.block, nheads_u, k.shape[3])

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.nbytes for x in (self.q, self.k, self.v, self.hops))

    def add_token(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Partial, Closed | None]:
        """Add one token; return its partial over the tail and the block that it completes.

        q `[1, 1, h, d]`; k, v `[1, 1, h_kv, d]`.
        """
        layer, grid, t = self.layer, self.layer.grid, self.stop
        place = t - self.open
        self.q[:, place], self.k[:, layer.halo + place] = q[:, 0], k[:, 0]
        self.v[:, layer.halo + place] = v[:, 0]
        self.stop = t + 1
        partial = None
        for mode in range(len(grid.modes)):
            part = self._token_branch(q, mode)
            if part is not None:
                partial = ops.merge_branch(partial, part, layer.bias, mode)
        assert partial is not None, "a token sees itself"
        for mode in range(len(grid.modes)):
            if self.stop % grid.strides[mode + 1] == 0:
                self._close_fibres(mode, grid.strides[mode + 1])
        return partial, self._close_block() if self.stop % grid.block == 0 else None

    def _token_branch(self, q: Tensor, mode: int) -> Partial | None:
        """Return the partial of the last token's branch `mode`; None if it sees nothing."""
        layer, grid, t = self.layer, self.layer.grid, self.stop - 1
        stride = grid.strides[mode]
        if mode == 0:
            first = max(0, (t // grid.modes[0] - grid.local_blocks + 1) * grid.modes[0])
            count = t + 1 - first
        else:
            outer = grid.strides[mode + 1]
            first = t - t % outer + t % stride
            count = (t - first) // stride - grid.local_blocks + 1
        if count <= 0:
            return None
        positions = first + torch.arange(count) * stride
        place = first - self.open
        k = self.k[:, layer.halo + place :: stride][:, :count]
        u = self.hops[:, place::stride] if mode else self.v[:, layer.halo + place :]
        q, k = layer.at(torch.tensor([t])).rotate(q, mode), layer.at(positions).rotate(k, mode)
        span = (0, 0, count)
        return Partial(*decode_single(q, k, u[:, :count], [span], layer.scale, layer.impl))

    def _close_fibres(self, mode: int, size: int) -> None:
        """Replace U of the last `size` tokens by that of the next mode."""
        layer = self.layer
        rotary = layer.at(torch.arange(self.stop - size, self.stop))
        own = slice(self.stop - size - self.open, self.stop - self.open)
        there = slice(layer.halo + own.start, layer.halo + own.stop)
        q, k = rotary.rotate(self.q[:, own], mode), rotary.rotate(self.k[:, there], mode)
        u = self.hops[:, own] if mode else self.v[:, there]
        self.hops[:, own] = hop_fwd(q, k, u, mode, rotary)[0]

    def _close_block(self) -> Closed:
        """Return the open block, which is complete, and move on to the next."""
        layer, block = self.layer, self.layer.grid.block
        positions = torch.arange(self.open, self.stop)
        k = layer.at(positions).rotate(self.k[:, layer.halo :], len(layer.grid.modes))
        closed = Closed(positions, k.clone(), self.hops.clone())
        if layer.halo:
            for x in (self.k, self.v):
                x[:, : layer.halo] = x[:, block:].clone()
        self.open = self.stop
        return closed

    def add_tokens(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Partial, Closed | None]:
        """Add several tokens; return their partial over the tail, and blocks that they complete."""
        layer, old = self.layer, self.stop - self.open
        q = torch.cat((self.q[:, :old], q), 1)
        k, v = (torch.cat((x[:, : layer.halo + old], y), 1) for x, y in ((self.k, k), (self.v, v)))
        partial, closed = self._blocks(q, k, v)
        return Partial(partial.out[:, old:], partial.lse[:, :, old:]), closed

    def set_halo(self, kv: Tensor, start: int) -> None:
        """Continue at `start`, where a block begins, after kv `[2, 1, halo, h_kv, d]`."""
        halo = self.layer.halo
        self.k[:, :halo], self.v[:, :halo] = kv[0], kv[1]
        self.open = self.stop = start

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Partial, Closed | None]:
        """Replace the tail by tokens from `open` on, and return their partial and whole blocks.

        q `[1, n, h, d]`; k, v `[1, halo + n, h_kv, d]`.
        """
        layer, grid, first = self.layer, self.layer.grid, self.open
        count, block, halo = q.shape[1], grid.block, layer.halo
        padded = count + -count % block
        positions = torch.arange(first, first + padded)
        rotary = layer.at(positions)
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padded - count)) for x in (q, k, v))
        values, partial = [v[:, halo:]], None
        for mode in range(len(grid.modes)):
            q_mode, own = rotary.rotate(q, mode), rotary.rotate(k[:, halo:], mode)
            part = self._branch(q_mode, own, values[-1], mode, k, v, positions)
            partial = ops.merge_branch(partial, part, layer.bias, mode)
            values.append(hop_fwd(q_mode, own, values[-1], mode, rotary)[0])
        assert partial is not None
        whole = count - count % block
        closed = None
        if whole:
            k_last = layer.at(positions[:whole]).rotate(k[:, halo : halo + whole], len(grid.modes))
            closed = Closed(positions[:whole], k_last, values[-1][:, :whole])
        self._keep(q, k, v, values, count)
        return Partial(partial.out[:, :count], partial.lse[:, :, :count]), closed

    def _branch(
        self,
        q: Tensor,
        own: Tensor,
        u: Tensor,
        mode: int,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
    ) -> Partial:
        """Return the partial of branch `mode` of whole blocks at `positions`."""
        layer, grid, halo = self.layer, self.layer.grid, self.layer.halo
        k_ids = positions
        if mode == 0 and halo:
            k_ids = torch.arange(int(positions[0]) - halo, int(positions[-1]) + 1)
            # Places before the text's start are hidden by the branch's band.
            own = torch.cat((layer.at(k_ids[:halo].clamp_min(0)).rotate(k[:, :halo], 0), own), 1)
            u = v
        branch = ops.fine_branch(mode, positions, torch.zeros_like(positions), k_ids, grid)
        return branch_fwd((q, own, u), branch, layer.scale)

    def _keep(self, q: Tensor, k: Tensor, v: Tensor, values: list[Tensor], count: int) -> None:
        """Keep the last tokens of blocks that begin at `open`, padded; see `_blocks`."""
        grid, halo = self.layer.grid, self.layer.halo
        whole = count - count % grid.block
        self.stop = self.open + count
        self.open += whole
        rest = count - whole
        self.q[:, :rest] = q[:, whole:count]
        self.k[:, : halo + rest] = k[:, whole : halo + count]
        self.v[:, : halo + rest] = v[:, whole : halo + count]
        for mode, u in enumerate(values[1:]):
            closed = rest - rest % grid.strides[mode + 1]
            self.hops[:, :closed] = u[:, whole : whole + closed]

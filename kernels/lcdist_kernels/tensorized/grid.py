"""Grid of tensorized attention: modes, digits, and the keys of each branch and hop.

A document is folded into modes of n_1 (finest), n_2, ... tokens. The coarsest mode is not listed
and grows with the document. With strides s_1 = 1, s_{j+1} = s_j n_j, position p has the digits

    c_j(p) = floor(p / s_j) mod n_j,   and the coarsest floor(p / s_m).

A fibre of mode j is the tokens that agree in all digits but c_j. Positions restart per document.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from lcdist_kernels.common import TensorNotes

PES = ("mode", "global")
HOP_HEADS = ("q", "kv")
# Digits of positions, which come again in every layer.
_DIGITS = TensorNotes()


@dataclass(frozen=True)
class ModeGrid:
    """Fold of a sequence into modes, and what branches read.

    Args:
        modes: tokens per mode, finest first, without the coarsest.
        local_blocks: blocks of the finest mode that branch 1 sees, the query's own included.
        pe: a branch rotates by the digit of its mode ("mode") or by positions ("global").
        hop_heads: hidden hops use every query head ("q") or the mean query of a group ("kv").

    Raises:
        ValueError: a value is illegal, or local_blocks > 1 with two or more modes.
    """

    modes: tuple[int, ...]
    local_blocks: int = 1
    pe: str = "mode"
    hop_heads: str = "q"

    def __post_init__(self) -> None:
        if any(mode < 1 for mode in self.modes):
            raise ValueError(f"modes = {self.modes}: every mode must be at least 1 token")
        if self.local_blocks < 1:
            raise ValueError(f"local_blocks = {self.local_blocks}: must be at least 1")
        if self.local_blocks > 1 and len(self.modes) > 1:
            raise ValueError(
                f"local_blocks = {self.local_blocks} with modes = {self.modes}: more than one "
                "local block goes with one mode only; set local_blocks = 1, or give one mode"
            )
        for name, value, legal in (
            ("pe", self.pe, PES),
            ("hop_heads", self.hop_heads, HOP_HEADS),
        ):
            if value not in legal:
                raise ValueError(f"{name} = {value!r}: must be one of {', '.join(legal)}")

    @property
    def strides(self) -> tuple[int, ...]:
        """Return s_1, ..., s_m: one more than there are modes; the last is their product."""
        return (1, *accumulate(self.modes, mul))

    @property
    def block(self) -> int:
        """Return the tokens of one step of the coarsest mode: the product of modes."""
        return self.strides[-1]

    def digit(self, positions: Tensor, mode: int) -> Tensor:
        """Return the digit of `mode` (0 is the finest) at integer positions of any shape."""
        digit = positions // self.strides[mode]
        return digit % self.modes[mode] if mode < len(self.modes) else digit

    def angle(self, positions: Tensor, mode: int) -> Tensor:
        """Return the positions by which queries and keys of `mode` are rotated."""
        # The local branch crosses blocks; within one block, digits have the same differences.
        local = mode == 0 and self.local_blocks > 1
        if self.pe == "global" or local:
            return positions
        key = self.strides[mode], self.modes[mode : mode + 1]
        return _DIGITS.find(positions, key, lambda: self.digit(positions, mode))

    def hop_mask(self, q_pos: Tensor, k_pos: Tensor, mode: int) -> Tensor:
        """Return which keys share a query's fibre of `mode`: bool `[s_q, s_k]`, one document."""
        low, high = self.strides[mode], self.strides[mode + 1] if mode < len(self.modes) else 0
        q_pos, k_pos = q_pos[:, None], k_pos[None]
        mask = q_pos % low == k_pos % low
        return mask & (q_pos // high == k_pos // high) if high else mask

    def branch_mask(self, q_pos: Tensor, k_pos: Tensor, mode: int) -> Tensor:
        """Return which keys branch `mode` reads: bool `[s_q, s_k]`, one document."""
        if mode == 0:
            mask = k_pos[None] <= q_pos[:, None]
            if not self.modes:
                return mask
            distance = q_pos[:, None] // self.modes[0] - k_pos[None] // self.modes[0]
            return mask & (distance < self.local_blocks)
        q_digit, k_digit = self.digit(q_pos, mode)[:, None], self.digit(k_pos, mode)[None]
        return self.hop_mask(q_pos, k_pos, mode) & (k_digit <= q_digit - self.local_blocks)


def branch_pairs(grid: ModeGrid, seqlen: int) -> int:
    """Return the (query, key) pairs that the branches of one document of `seqlen` tokens read.

    In closed form, as plans count documents of any length.
    """
    if not grid.modes:
        return _triangle(seqlen)
    size, blocks = grid.modes[0], grid.local_blocks
    near = min(seqlen, blocks * size)
    whole, rest = divmod(seqlen - near, size)
    pairs = _triangle(near) + whole * _triangle(size) + _triangle(rest)
    pairs += (whole * size + rest) * (blocks - 1) * size
    for mode in range(1, len(grid.modes) + 1):
        stride, periods, rest = grid.strides[mode], 0, seqlen
        if mode < len(grid.modes):
            periods, rest = divmod(seqlen, stride * grid.modes[mode])
            pairs += periods * stride * _triangle(max(0, grid.modes[mode] - blocks))
        digits, rest = divmod(rest, stride)
        pairs += stride * _triangle(max(0, digits - blocks)) + rest * max(0, digits - blocks + 1)
    return pairs


def _triangle(count: int) -> int:
    return count * (count + 1) // 2


def initial_bias(modes: Sequence[int], nheads: int) -> Tensor:
    """Return log s_j for each coarse mode and query head, float64 `[len(modes), nheads]`.

    A coarse key stands for s_j tokens: with constant scores the output is then the causal mean.
    """
    strides = torch.tensor(list(accumulate(modes, mul)), dtype=torch.float64)
    return strides.log()[:, None].repeat(1, nheads)


def check_bias(bias: Tensor, grid: ModeGrid, nheads: int) -> None:
    """Raise ValueError unless `bias` is `[len(modes), nheads]`."""
    if bias.shape != (len(grid.modes), nheads):
        raise ValueError(
            f"branch_bias of shape {tuple(bias.shape)}: expected "
            f"[{len(grid.modes)}, {nheads}], one per coarse mode and query head"
        )


def check_documents(starts: Tensor, grid: ModeGrid) -> None:
    """Raise ValueError unless every document starts at a multiple of the product of modes.

    starts: the first token of each token's document.
    """
    firsts = starts.unique_consecutive()
    wrong = (firsts % grid.block).nonzero().flatten()
    if len(wrong):
        document, start = int(wrong[0]), int(firsts[wrong[0]])
        before = start - int(firsts[document - 1])
        raise ValueError(
            f"document {document} starts at token {start}, as document {document - 1} has "
            f"{before} tokens: with modes = {grid.modes} every document must start at a multiple "
            f"of {grid.block}; pad documents to it"
        )

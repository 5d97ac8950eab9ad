"""How documents are laid out for attention that works on blocks: borders aligned, landmarks put in.

A row has slots. Each holds a token of text, a landmark (one at the end of every block of
`block_size` slots, as in arXiv:2305.16300, where blocks begin anew in every document), or padding,
which fills a document up to a multiple of `multiple` slots.
"""

from dataclasses import dataclass
from math import lcm

import numpy as np
import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class DocumentLayout:
    """The layout of a document.

    multiple: slots, of which every document begins at a multiple. landmark: the token that ends
    every block of `block_size` slots, None for none. Tensors of slots are int64 `[slots]`, padding
    PADDING.
    """

    multiple: int = 1
    block_size: int = 1
    landmark: int | None = None

    @property
    def plain(self) -> bool:
        """Whether slots are just the tokens of the text."""
        return self.multiple == 1 and self.landmark is None

    @property
    def step(self) -> int:
        """Slots that a document's number of slots is a multiple of."""
        return self.multiple if self.landmark is None else lcm(self.multiple, self.block_size)

    def length(self, tokens: np.ndarray) -> np.ndarray:
        """The slots that documents of so many tokens take, padding included; of its shape."""
        filled = tokens
        if self.landmark is not None:
            content = self.block_size - 1
            filled = -(-tokens // content) * self.block_size
        return -(-filled // self.step) * self.step

    def num_text_slots(self, slot: int) -> int:
        """How many slots for text there are before slot number `slot` of a document."""
        if self.landmark is None:
            return slot
        content = self.block_size - 1
        return slot // self.block_size * content + min(slot % self.block_size, content)

    def num_slots(self, tokens: int) -> int:
        """The slots up to and with the last of a document's `tokens` >= 1 tokens; no padding."""
        if self.landmark is None:
            return tokens
        return tokens + (tokens - 1) // (self.block_size - 1)

    def place(self, text: Tensor, start: int, stop: int, tokens: int) -> Tensor:
        """Slots [start, stop) of a document of `tokens` tokens.

        text: the document's tokens from `num_text_slots(start)` on, as many as are in these slots.
        """
        slots = torch.full((stop - start,), PADDING, dtype=torch.int64)
        numbers = torch.arange(start, stop)
        holds = torch.ones_like(numbers, dtype=torch.bool)
        if self.landmark is not None:
            ends = numbers % self.block_size == self.block_size - 1
            # A block without text needs no landmark: nothing is ever asked of it.
            used = numbers // self.block_size * (self.block_size - 1) < tokens
            slots[ends & used] = self.landmark
            holds = ~ends
        places = holds.nonzero().flatten()[: len(text)]
        slots[places] = text
        return slots

    def is_text(self, slots: Tensor) -> Tensor:
        """Which slots hold a token of text: bool, of the shape of `slots`."""
        text = slots != PADDING
        return text if self.landmark is None else text & (slots != self.landmark)

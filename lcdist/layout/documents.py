"""Layout of documents for attention on blocks: align borders and insert landmarks.

A row consists of slots. A slot holds one of three things:

- a token of text;
- a landmark, at the end of every block of `block_size` slots (arXiv:2305.16300); blocks are counted
  from the start of each document;
- padding, which fills a document up to a multiple of `multiple` slots.
"""

from dataclasses import dataclass
from math import lcm

import numpy as np
import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class DocumentLayout:
    """Layout of one document in slots. Tensors of slots are int64 `[slots]`, padding is PADDING.

    Attributes:
        multiple: Every document starts at a multiple of this many slots.
        block_size: Slots of a block, its landmark included.
        landmark: Token that ends every block; None: no landmarks.
    """

    multiple: int = 1
    block_size: int = 1
    landmark: int | None = None

    @property
    def plain(self) -> bool:
        """Return whether every slot holds a token of text."""
        return self.multiple == 1 and self.landmark is None

    @property
    def step(self) -> int:
        """The number that a document's slots, padding included, are a multiple of."""
        return self.multiple if self.landmark is None else lcm(self.multiple, self.block_size)

    def length(self, tokens: np.ndarray) -> np.ndarray:
        """Return the slots of documents with `tokens` tokens, padding included; same shape."""
        slots = tokens
        if self.landmark is not None:
            text_per_block = self.block_size - 1
            slots = -(-tokens // text_per_block) * self.block_size
        return -(-slots // self.step) * self.step

    def num_text_slots(self, slot: int) -> int:
        """Return the number of text slots before slot number `slot` of a document."""
        if self.landmark is None:
            return slot
        text_per_block = self.block_size - 1
        whole_blocks, rest = divmod(slot, self.block_size)
        return whole_blocks * text_per_block + min(rest, text_per_block)

    def num_slots(self, tokens: int) -> int:
        """Return the slots of a document of `tokens` >= 1 tokens up to its last token."""
        if self.landmark is None:
            return tokens
        return tokens + (tokens - 1) // (self.block_size - 1)

    def place(self, text: Tensor, start: int, stop: int, tokens: int) -> Tensor:
        """Fill slots [start, stop) of a document.

        Args:
            text: The document's tokens from `num_text_slots(start)` on, as many as fit.
            start: First slot.
            stop: End of the slots.
            tokens: Tokens of the whole document.

        Returns:
            Slots, int64 `[stop - start]`.
        """
        slots = torch.full((stop - start,), PADDING, dtype=torch.int64)
        numbers = torch.arange(start, stop)
        for_text = torch.ones_like(numbers, dtype=torch.bool)
        if self.landmark is not None:
            block_ends = numbers % self.block_size == self.block_size - 1
            # A block without text needs no landmark: no query attends to it.
            has_text = numbers // self.block_size * (self.block_size - 1) < tokens
            slots[block_ends & has_text] = self.landmark
            for_text = ~block_ends
        text_slots = for_text.nonzero().flatten()[: len(text)]
        slots[text_slots] = text
        return slots

    def is_text(self, slots: Tensor) -> Tensor:
        """Return which slots hold a token of text: bool, shape of `slots`."""
        is_token = slots != PADDING
        return is_token if self.landmark is None else is_token & (slots != self.landmark)

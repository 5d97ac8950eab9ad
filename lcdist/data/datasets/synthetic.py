"""Learnable synthetic tokens: a small Markov chain with words that recur at long distances.

The Markov chain, one for the whole dataset, can be learned from neighbouring tokens alone. Every
document also has a random word that recurs at long distances. It can only be predicted by copying
an earlier occurrence, as in the induction task of arXiv:2209.11895.
"""

from itertools import accumulate, islice
from operator import getitem, itemgetter
from typing import Any

import numpy as np
import torch

from lcdist.data.datasets.sample import Sample, check_seed, random_uint64

# Probabilities of a token's four successors, in sixteenths.
_SUCCESSOR_WEIGHTS = (9, 4, 2, 1)
_CHAIN_STREAM, _TEXT_STREAM = 0, 1
_MAX_WORD_TOKENS = 16


Row = list[Any]
"""A token's successors, which are rows, one for each of 16 choices; then the token itself."""


class SyntheticDataset:
    """Endless samples of `seqlen` synthetic tokens below `vocab_size`; token 0 ends a document.

    Documents have between about seqlen / 8 and seqlen tokens, and at least two.

    Raises:
        ValueError: vocab_size or seqlen is below 2, or seed is not a 64-bit number.
    """

    def __init__(self, vocab_size: int, seqlen: int, seed: int) -> None:
        if vocab_size < 2 or seqlen < 2:
            raise ValueError(f"vocab_size = {vocab_size}, seqlen = {seqlen}: both must be >= 2")
        check_seed(seed)
        self.vocab_size = vocab_size
        self.seqlen = seqlen
        self.seed = seed
        self.eos_id = 0
        # No sample has this number, so the chain shares its key with none.
        chain_key = (seed, 2**64 - 1)
        numbers = random_uint64(len(_SUCCESSOR_WEIGHTS) * vocab_size, chain_key, _CHAIN_STREAM)
        successors = self._to_tokens(numbers).reshape(vocab_size, len(_SUCCESSOR_WEIGHTS))
        self._rows = _linked_rows(np.repeat(successors, _SUCCESSOR_WEIGHTS, axis=1))

    def sample(self, index: int) -> Sample:
        """Return sample number `index` >= 0, a function of (seed, index) alone."""
        assert index >= 0
        total = self.seqlen + 1
        numbers = random_uint64(total * 3, (self.seed, index), _TEXT_STREAM).reshape(3, total)
        tokens = np.asarray(self._walk_chain(numbers[0]))
        borders, start = [], 0
        min_length = max(2, self.seqlen // 8)
        num_lengths = max(1, self.seqlen - min_length + 1)
        while start < total:
            end = start + min_length + int(numbers[1, start] % np.uint64(num_lengths))
            self._repeat_word(tokens[start : min(end, total)], numbers[2, start:])
            if end <= total:
                tokens[end - 1] = self.eos_id
                borders.append(end)
            start = end
        inner_borders = [border for border in borders if border < self.seqlen]
        return Sample(
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            cu_seqlens=torch.tensor([0, *inner_borders, self.seqlen], dtype=torch.int32),
            ends_document=self.seqlen in borders,
        )

    def _to_tokens(self, numbers: np.ndarray) -> np.ndarray:
        """Map random numbers to tokens 1..vocab_size - 1."""
        return (numbers % np.uint64(self.vocab_size - 1)).astype(np.int64) + 1

    def _walk_chain(self, numbers: np.ndarray) -> list[int]:
        """Return one token of the Markov chain for each random number."""
        first = self._rows[int(self._to_tokens(numbers[:1])[0])]
        choices = (numbers >> np.uint64(60)).tolist()
        # Both run in C: a Python step a token would take as long as a small model's forward pass.
        walk = accumulate(choices, getitem, initial=first)
        return list(map(itemgetter(-1), islice(walk, 1, None)))

    def _repeat_word(self, document: np.ndarray, numbers: np.ndarray) -> None:
        """Write one random word several times into `document`, in place."""
        length = min(_MAX_WORD_TOKENS, len(document) // 4)
        word = self._to_tokens(numbers[:length])
        if length:
            for start in range(0, len(document) - length, max(2 * length, len(document) // 4)):
                document[start : start + length] = word


def _linked_rows(successors: np.ndarray) -> list[Row]:
    """Return the row of every token from its successors' tokens `[vocab_size, 16]`."""
    rows: list[Row] = [[] for _ in successors]
    for token, (row, after) in enumerate(zip(rows, successors.tolist(), strict=True)):
        row.extend(map(rows.__getitem__, after))
        row.append(token)
    return rows

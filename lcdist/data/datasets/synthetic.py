"""Made-up tokens that can be learned: a small Markov chain with words that come back far away.

The chain, one for the whole data set, is learned from neighbours alone; every document also has a
word of its own that returns at long distances and can only be copied from its earlier places, as
in the induction task of arXiv:2209.11895.
"""

import numpy as np
import torch

from lcdist.data.datasets.sample import Sample, check_seed, raw_numbers

# In sixteenths: how often the chain goes to each of a token's four successors.
_ODDS = (9, 4, 2, 1)
_CHAIN, _TEXT = 0, 1
_WORD = 16


class SyntheticDataset:
    """Endless samples of `seqlen` made-up tokens below `vocab_size`; token 0 ends a document.

    Documents have from about an eighth of seqlen to all of it, and at least two tokens. Raises
    ValueError where vocab_size or seqlen is below 2.
    """

    def __init__(self, vocab_size: int, seqlen: int, seed: int) -> None:
        if vocab_size < 2 or seqlen < 2:
            raise ValueError(f"vocab_size = {vocab_size}, seqlen = {seqlen}: both must be >= 2")
        check_seed(seed)
        self.vocab_size = vocab_size
        self.seqlen = seqlen
        self.seed = seed
        self.eos_id = 0
        # No sample has so high a number, so the chain shares its key with none.
        numbers = raw_numbers(len(_ODDS) * vocab_size, (seed, 2**64 - 1), _CHAIN)
        successors = self._tokens(numbers).reshape(vocab_size, len(_ODDS))
        self._next: list[list[int]] = np.repeat(successors, _ODDS, axis=1).tolist()

    def sample(self, index: int) -> Sample:
        """The sample with number `index` >= 0; the same wherever and whenever it is drawn."""
        assert index >= 0
        total = self.seqlen + 1
        numbers = raw_numbers(total * 3, (self.seed, index), _TEXT).reshape(3, total)
        tokens = np.asarray(self._walk(numbers[0]))
        borders, start = [], 0
        while start < total:
            shortest = max(2, self.seqlen // 8)
            span = max(1, self.seqlen - shortest + 1)
            end = start + shortest + int(numbers[1, start] % np.uint64(span))
            self._repeat_word(tokens[start : min(end, total)], numbers[2, start:])
            if end <= total:
                tokens[end - 1] = self.eos_id
                borders.append(end)
            start = end
        inside = [border for border in borders if border < self.seqlen]
        return Sample(
            tokens=torch.from_numpy(tokens.astype(np.int64)),
            cu_seqlens=torch.tensor([0, *inside, self.seqlen], dtype=torch.int32),
            closed=self.seqlen in borders,
        )

    def _tokens(self, numbers: np.ndarray) -> np.ndarray:
        return (numbers % np.uint64(self.vocab_size - 1)).astype(np.int64) + 1

    def _walk(self, numbers: np.ndarray) -> list[int]:
        token, walk = int(self._tokens(numbers[:1])[0]), []
        for choice in (numbers >> np.uint64(60)).tolist():
            token = self._next[token][choice]
            walk.append(token)
        return walk

    def _repeat_word(self, document: np.ndarray, numbers: np.ndarray) -> None:
        length = min(_WORD, len(document) // 4)
        word = self._tokens(numbers[:length])
        if length:
            for start in range(0, len(document) - length, max(2 * length, len(document) // 4)):
                document[start : start + length] = word

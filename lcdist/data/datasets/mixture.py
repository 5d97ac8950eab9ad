"""Several data sets as one, each with a share of the tokens.

A cycle of samples, the same over and over, has every source as often as its share says, spread
evenly: so the share is exact over every cycle and nearly so over any stretch, and the number of
samples a source gave before sample i is a closed form. Nothing has to be remembered.
"""

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from math import lcm

import numpy as np
from torch import Tensor

from lcdist.data.datasets.packed import PackedDataset
from lcdist.data.datasets.sample import Sample
from lcdist.data.datasets.tokens import TokenDataset

Folder = TokenDataset | PackedDataset
# The longest cycle; shares that need a longer one are rounded to parts of it.
_CYCLE = 2**16


class Mixture:
    """Samples of `sources`, each in the order it would have alone.

    weights: shares of the tokens, in any unit. A sample has tokens of one source only. Raises
    ValueError where a share is too small for the cycle.
    """

    def __init__(
        self, sources: Mapping[str, Folder], weights: Mapping[str, float], seed: int
    ) -> None:
        self.sources, self.seed = dict(sources), seed
        first, *others = sources.values()
        assert all(one.seqlen == first.seqlen for one in others)
        self.seqlen, self.vocab_size, self.meta = first.seqlen, first.vocab_size, first.meta
        self._folders = list(sources.values())
        # Rows are shared out; a row of one source may hold more padding than that of another.
        per_token = {
            name: Fraction(str(weights[name])) * one.round_rows / round_tokens(one)
            for name, one in sources.items()
        }
        self._counts = _whole_shares(per_token)
        # Source i gives its j-th sample of a cycle at (j + 1/2) / counts[i] of it.
        times = np.concatenate([(np.arange(n) + 0.5) / n for n in self._counts])
        owners = np.repeat(np.arange(len(self._counts)), self._counts)
        self._owners = owners[np.argsort(times, kind="stable")]
        ranks = np.zeros(len(owners), np.int64)
        for number, count in enumerate(self._counts):
            ranks[self._owners == number] = np.arange(count)
        self._ranks = ranks

    @property
    def cycle(self) -> int:
        """Samples after which the order of the sources begins again."""
        return len(self._owners)

    def sample(self, index: int) -> Sample:
        """The sample with number `index` >= 0; the same wherever and whenever it is drawn."""
        number, inner = self.place(index)
        return self._folders[number].sample(inner)

    def table(self, index: int) -> Tensor:
        """`cu_seqlens` of the sample with number `index`, without its tokens."""
        number, inner = self.place(index)
        return self._folders[number].table(inner)

    def place(self, index: int) -> tuple[int, int]:
        """(number of the source, number of the sample in it) of sample `index`."""
        assert index >= 0
        cycles, at = divmod(index, self.cycle)
        number = int(self._owners[at])
        return number, cycles * self._counts[number] + int(self._ranks[at])

    def drawn(self, samples: int) -> dict[str, int]:
        """How many of the first `samples` samples are of each source."""
        cycles, rest = divmod(samples, self.cycle)
        begun = np.bincount(self._owners[:rest], minlength=len(self._counts))
        return {
            name: cycles * count + int(more)
            for name, count, more in zip(self.sources, self._counts, begun, strict=True)
        }


def round_tokens(folder: Folder) -> int:
    """Tokens of text in a round of `folder`."""
    lengths = folder.document_lengths
    return int((lengths * folder.long.copies(lengths)).sum())


def source_seed(seed: int, name: str) -> int:
    """A source's own seed, so that another one beside it changes nothing in its order."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big")


def _whole_shares(shares: Mapping[str, Fraction]) -> list[int]:
    """Whole numbers in the proportion of `shares`; rounded where those would be too large."""
    total = sum(shares.values())
    exact = [share / total for share in shares.values()]
    cycle = lcm(*(share.denominator for share in exact))
    if cycle <= _CYCLE:
        return [int(share * cycle) for share in exact]
    whole = [int(share * _CYCLE) for share in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i] * _CYCLE)
    for i in by_rest[: _CYCLE - sum(whole)]:
        whole[i] += 1
    for name, count in zip(shares, whole, strict=True):
        if not count:
            raise ValueError(
                f"data.mixture.{name}.weight is less than one part in {_CYCLE} of all weights: "
                "raise it, or leave the source out"
            )
    return whole

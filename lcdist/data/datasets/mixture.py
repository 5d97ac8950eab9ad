"""A mixture of several datasets, each with a share of the tokens.

The order of the sources repeats in cycles. A cycle contains each source in proportion to its share,
evenly spread. The shares are therefore exact over every cycle and almost exact over any range, and
the number of samples of a source before sample i has a closed form. No state is needed.
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

FolderDataset = TokenDataset | PackedDataset
# Longest cycle in samples; shares that need a longer one are rounded to multiples of 1 / 2**16.
_MAX_CYCLE = 2**16


class Mixture:
    """Samples of several sources, each source in the order that it has alone.

    A sample contains tokens of one source only.

    Args:
        sources: datasets by name, all with the same seqlen.
        weights: shares of the tokens by name, in any unit.
        seed: seed of the run.

    Raises:
        ValueError: a share is too small for the longest cycle.
    """

    def __init__(
        self, sources: Mapping[str, FolderDataset], weights: Mapping[str, float], seed: int
    ) -> None:
        self.sources, self.seed = dict(sources), seed
        first, *others = sources.values()
        assert all(dataset.seqlen == first.seqlen for dataset in others)
        self.seqlen, self.vocab_size, self.meta = first.seqlen, first.vocab_size, first.meta
        self._datasets = list(sources.values())
        # Weights are shares of tokens, but samples are counted: padding differs between sources.
        sample_shares = {
            name: Fraction(str(weights[name])) * dataset.samples_per_round / round_tokens(dataset)
            for name, dataset in sources.items()
        }
        self._counts = _whole_counts(sample_shares)
        # Sample j of source i in a cycle is at the fraction (j + 1/2) / counts[i] of the cycle.
        times = np.concatenate([(np.arange(n) + 0.5) / n for n in self._counts])
        owners = np.repeat(np.arange(len(self._counts)), self._counts)
        self._source_numbers = owners[np.argsort(times, kind="stable")]
        # Number of each sample among the samples of its source in the cycle.
        self._inner_numbers = np.zeros(len(owners), np.int64)
        for number, count in enumerate(self._counts):
            self._inner_numbers[self._source_numbers == number] = np.arange(count)

    @property
    def cycle(self) -> int:
        """Number of samples after which the order of the sources repeats."""
        return len(self._source_numbers)

    def sample(self, index: int) -> Sample:
        """Return sample number `index` >= 0, a function of (seed, index) alone."""
        number, inner = self.locate(index)
        return self._datasets[number].sample(inner)

    def cu_seqlens(self, index: int) -> Tensor:
        """Return `cu_seqlens` of sample number `index` without reading its tokens."""
        number, inner = self.locate(index)
        return self._datasets[number].cu_seqlens(inner)

    def locate(self, index: int) -> tuple[int, int]:
        """Return (number of the source, sample number within it) of sample `index`."""
        assert index >= 0
        cycles, position = divmod(index, self.cycle)
        number = int(self._source_numbers[position])
        return number, cycles * self._counts[number] + int(self._inner_numbers[position])

    def samples_by_source(self, num_samples: int) -> dict[str, int]:
        """Return how many of the first `num_samples` samples come from each source."""
        cycles, rest = divmod(num_samples, self.cycle)
        partial = np.bincount(self._source_numbers[:rest], minlength=len(self._counts))
        return {
            name: cycles * count + int(extra)
            for name, count, extra in zip(self.sources, self._counts, partial, strict=True)
        }


def round_tokens(dataset: FolderDataset) -> int:
    """Return the number of text tokens in a round of `dataset`."""
    lengths = dataset.document_lengths
    return int((lengths * dataset.long_documents.copies(lengths)).sum())


def source_seed(seed: int, name: str) -> int:
    """Return a seed for one source, so that other sources do not affect its order."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "big")


def _whole_counts(shares: Mapping[str, Fraction]) -> list[int]:
    """Return whole numbers in the ratio of `shares`; rounded if they would exceed the cycle."""
    total = sum(shares.values())
    exact = [share / total for share in shares.values()]
    cycle = lcm(*(share.denominator for share in exact))
    if cycle <= _MAX_CYCLE:
        return [int(share * cycle) for share in exact]
    counts = [int(share * _MAX_CYCLE) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i] * _MAX_CYCLE)
    for i in by_remainder[: _MAX_CYCLE - sum(counts)]:
        counts[i] += 1
    for name, count in zip(shares, counts, strict=True):
        if not count:
            raise ValueError(
                f"data.mixture.{name}.weight is less than one part in {_MAX_CYCLE} of all weights: "
                "raise it, or leave the source out"
            )
    return counts

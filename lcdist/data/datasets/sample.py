"""A sample of tokens, and what a data set has to offer: any sample by its number."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """seqlen input tokens and the label of the last one.

    tokens: int64 `[seqlen + 1]`, padding -1, laid out as `DocumentLayout` say. cu_seqlens: int32
    `[n + 1]`, where the documents of the first seqlen tokens begin and end. closed: whether a
    document ends with token seqlen - 1, so that its label, the last of `tokens`, belongs to
    another one.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    closed: bool


class Dataset(Protocol):
    """Samples of seqlen tokens for every index >= 0, each a function of (seed, index) alone."""

    vocab_size: int
    seqlen: int
    seed: int

    def sample(self, index: int) -> Sample:
        """The sample with number `index`."""
        ...


@runtime_checkable
class HasTable(Protocol):
    """A data set that can say where a sample's documents are without reading its tokens."""

    def table(self, index: int) -> Tensor:
        """`cu_seqlens` of the sample with number `index`."""
        ...


def raw_numbers(count: int, key: tuple[int, int], stream: int = 0) -> np.ndarray:
    """`count` uniform uint64 numbers: Philox 4x64-10 (Salmon et al., SC11, Random123).

    The counter-based generator's raw output is the same in every version of numpy, unlike what
    its distributions make of it. stream: numbers of another purpose under the same key.
    """
    # From a plain list numpy goes through float64 and folds large keys into one.
    words = np.array(key, np.uint64)
    generator = np.random.Philox(counter=np.array([0, 0, 0, stream], np.uint64), key=words)
    return np.asarray(generator.random_raw(count), np.uint64).reshape(count)


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` is a number of 64 bits."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed}: must be in 0..2**64 - 1")

"""The sample type, the interface of datasets, and the random numbers that datasets use."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """seqlen input tokens and the label of the last one.

    Attributes:
        tokens: int64 `[seqlen + 1]`, padding -1, placed by a `DocumentLayout`.
        cu_seqlens: int32 `[n + 1]`, borders of the documents in the first seqlen tokens.
        ends_document: whether a document ends at token seqlen - 1. Then the label of that token
            (the last entry of `tokens`) belongs to another document.
        is_target: bool, one for each text token in `tokens`, in order: whether the model is asked
            to predict it. None: all of them.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    ends_document: bool
    is_target: Tensor | None = None


class Dataset(Protocol):
    """Samples of seqlen tokens for every index >= 0, each a function of (seed, index) alone."""

    vocab_size: int
    seqlen: int
    seed: int

    def sample(self, index: int) -> Sample:
        """Return sample number `index`."""
        ...


@runtime_checkable
class HasCuSeqlens(Protocol):
    """A dataset that knows the document borders of a sample without reading its tokens."""

    def cu_seqlens(self, index: int) -> Tensor:
        """Return `cu_seqlens` of sample number `index`."""
        ...


def random_uint64(count: int, key: tuple[int, int], stream: int = 0) -> np.ndarray:
    """Return `count` uniform uint64 numbers: Philox 4x64-10 (Salmon et al., SC11, Random123).

    The raw output of this counter-based generator is the same in every version of numpy. The
    numbers that numpy's distributions derive from it are not.

    Args:
        count: how many numbers to return.
        key: two 64-bit words that select the sequence.
        stream: selects an independent sequence under the same key, one for each purpose.
    """
    # From a plain list numpy goes through float64, which maps large keys to the same word.
    words = np.array(key, np.uint64)
    generator = np.random.Philox(counter=np.array([0, 0, 0, stream], np.uint64), key=words)
    return np.asarray(generator.random_raw(count), np.uint64).reshape(count)


def check_seed(seed: int) -> None:
    """Raise ValueError unless `seed` is a 64-bit number."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed = {seed}: must be in 0..2**64 - 1")

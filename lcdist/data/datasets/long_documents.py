"""Long documents drawn more often than short ones, within each source (arXiv:2402.10171).

A factor says how often a document is drawn for every time that a short one is. Counts have to be
whole to be exact: a round has every document a whole number of times, in the proportion of the
factors, so after any whole number of rounds each has been drawn just as often as was asked.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

# A round repeats the corpus at most so often; factors that need more are refused.
MOST_COPIES = 20


@dataclass(frozen=True)
class LongDocuments:
    """Bands of lengths: documents of bounds[i] tokens or more, below bounds[i + 1], get factors[i].

    Those below bounds[0] have the factor 1. bounds ascend; there are as many factors.
    """

    bounds: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()

    @cached_property
    def copies_by_band(self) -> tuple[int, ...]:
        """How often a round has the documents of each band, those below all bounds first.

        Raises ValueError where a round would repeat the corpus more than `MOST_COPIES` times.
        """
        exact = [Fraction(1), *(Fraction(str(factor)) for factor in self.factors)]
        times = lcm(*(factor.denominator for factor in exact))
        if times > MOST_COPIES:
            raise ValueError(
                f"data.long_factor = {list(self.factors)}: in whole numbers they are "
                f"{', '.join(str(factor * times) for factor in exact)}; use factors that are whole "
                f"after multiplication with one number up to {MOST_COPIES}, such as 2.5 or 1.2"
            )
        return tuple(int(factor * times) for factor in exact)

    def bands(self, lengths: np.ndarray) -> np.ndarray:
        """The band of documents of so many tokens: 0 below all bounds."""
        return np.searchsorted(np.asarray(self.bounds, np.int64), lengths, side="right")

    def copies(self, lengths: np.ndarray) -> np.ndarray:
        """How often a round has documents of so many tokens; of the shape of `lengths`."""
        return np.asarray(self.copies_by_band, np.int64)[self.bands(lengths)]

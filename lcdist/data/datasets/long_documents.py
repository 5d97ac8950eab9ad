"""Upsample long documents within each source (arXiv:2402.10171).

A factor is the frequency of a document relative to a short one. To be exact, counts have to be
whole numbers. A round contains every document a whole number of times, in the ratio of the factors,
so after any whole number of rounds the frequencies are exact.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np

# Limit on the number of copies of a short document in a round; other factors are refused.
MAX_COPIES = 20


@dataclass(frozen=True)
class LongDocuments:
    """Upsampling factors by length band.

    Documents of bounds[i] tokens or more, and fewer than bounds[i + 1], get factors[i]. Documents
    below bounds[0] get the factor 1.

    Attributes:
        bounds: ascending lengths in tokens.
        factors: as many as `bounds`.
    """

    bounds: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()

    @cached_property
    def copies_by_band(self) -> tuple[int, ...]:
        """Copies per round of a document of each band; the band below all bounds comes first.

        Raises:
            ValueError: a round would contain short documents more than `MAX_COPIES` times.
        """
        exact = [Fraction(1), *(Fraction(str(factor)) for factor in self.factors)]
        times = lcm(*(factor.denominator for factor in exact))
        if times > MAX_COPIES:
            raise ValueError(
                f"data.long_factor = {list(self.factors)}: in whole numbers they are "
                f"{', '.join(str(factor * times) for factor in exact)}; use factors that are whole "
                f"after multiplication with one number up to {MAX_COPIES}, such as 2.5 or 1.2"
            )
        return tuple(int(factor * times) for factor in exact)

    def bands(self, lengths: np.ndarray) -> np.ndarray:
        """Return the band of each length in tokens; 0 is below all bounds."""
        return np.searchsorted(np.asarray(self.bounds, np.int64), lengths, side="right")

    def copies(self, lengths: np.ndarray) -> np.ndarray:
        """Return the copies per round of documents of these lengths, in the shape of `lengths`."""
        return np.asarray(self.copies_by_band, np.int64)[self.bands(lengths)]

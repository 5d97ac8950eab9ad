"""Decoding cache of full attention."""

from torch import Tensor

from lcdist.attention.full.length import scaled_queries
from lcdist.attention.shared.key_value_cache import KeyValueCache


class FullCache(KeyValueCache):
    """Keeps rotated keys and values; queries are scaled by their positions with `length_scale`."""

    def queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """Return q rotated and, with `length_scale`, scaled."""
        q, length = super().queries(q, positions), self.spec.options.length_scale
        return q if length is None else scaled_queries(q, positions.to(q.device), length)
